// The products of learnable token merging on the CPU, by panels of two vectors.
//
// The right operand is packed, panel by panel, [panel][depth][lanes of the panel]: a panel stays in L1 while
// the rows of the left operand go by.
#pragma once
#include "mask_cpu.h"

namespace vitkernels::learnable_token_merge {
namespace VITKERNELS_ISA {

constexpr int kPanelVecs = 2, kRows = kVectorRegisters == 32 ? 12 : 6;
constexpr int kGroupPanels = 6;  // panels of an item: whole cache lines of several rows
#if defined(__FMA__) || defined(__aarch64__)
constexpr int kTerms = 256;  // of one chain of sums
#else
constexpr int kTerms = 32;
#endif
// Of a panel of one vector: of few columns, which a library's product sums in shorter chains too.
constexpr int kTermsOfOne = kTerms < kRun ? kTerms : kRun;

// Lanes cut into equal panels, and those into groups.
template <class T>
struct Panels {
  int lanes, vecs, count, groups;
  explicit Panels(int64_t n)
      : lanes(static_cast<int>(n)),
        vecs(ceil_div(lanes, kLanes<T>)),
        count(ceil_div(vecs, kPanelVecs)),
        groups(ceil_div(count, kGroupPanels)) {}
  // The first panel of a group, and the first vector of a panel.
  int panel(int group) const { return static_cast<int>(static_cast<int64_t>(count) * group / groups); }
  int vec(int panel) const { return static_cast<int>(static_cast<int64_t>(vecs) * panel / count); }
};
constexpr int kGroupVecs = kGroupPanels * kPanelVecs;

// Rows of the left operand by one panel of `vecs` vectors. Packed, the left operand is [group][depth][row of
// the group], in groups of kRows rows and a last one of what remains.
template <class T>
static void multiply_panel(int vecs, const Product<T>& p, bool packed) {
  const int terms = vecs == 1 ? kTermsOfOne : kTerms;
  // A product of no terms is one run: it has zeros to store.
  const int runs = p.depth ? ceil_div(p.depth, terms) : 1;
  Product<T> part = p;
  for (int row = 0; row < p.rows; row += kRows) {
    part.rows = imin(kRows, p.rows - row);
    part.a_row = packed ? 1 : p.a_row;
    part.a_k = packed ? part.rows : p.a_k;
    part.a = p.a + row * (packed ? p.depth : p.a_row);
    part.b = p.b;
    part.c = p.c + row * p.c_row;
    part.add = p.add ? p.add + row * p.add_row : nullptr;
    part.add_row = p.add_row;
    for (int left = p.depth, run = runs; run > 0; --run) {
      part.depth = ceil_div(left, run);
      if (vecs == 2)
        multiply_rows<T, 2, kRows>(part, part.rows, 0, 0);
      else
        multiply_rows<T, 1, kRows>(part, part.rows, 0, 0);
      left -= part.depth;
      part.a += part.depth * part.a_k;
      part.b += part.depth * part.b_k;
      part.add = part.c;
      part.add_row = part.c_row;
    }
  }
}

// Packs the lanes of panels [begin, end) of a matrix of `rows` rows.
template <class E, class T>
static void pack_panels(T* to, const E* from, ptrdiff_t row, int rows, const Panels<T>& panels, int begin,
                        int end) {
  constexpr int L = kLanes<T>;
  const int first = panels.vec(begin), last = panels.vec(end), vecs = last - first;
  if (vecs == kPanelVecs * (end - begin) && last * L <= panels.lanes) {
    // Row by row: what lies together is read together.
    const ptrdiff_t step = static_cast<ptrdiff_t>(rows) * kPanelVecs * L;
    for (int r = 0; r < rows; ++r, to += kPanelVecs * L) {
      const E* source = from + r * row + first * L;
      T* target = to;
      for (int panel = begin; panel < end; ++panel, target += step, source += kPanelVecs * L)
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVecs; ++v) store(target + v * L, load(source + v * L));
    }
    return;
  }
  for (int panel = begin; panel < end; ++panel) {
    const int lane = panels.vec(panel) * L, width = panels.vec(panel + 1) * L - lane;
    pack(to, width, from + lane, row, 1, rows, imin(width, panels.lanes - lane), T(1));
    to += static_cast<ptrdiff_t>(rows) * width;
  }
}

// Rows of sums to a tensor's rows.
template <class E, class T>
static void write_panel(E* to, ptrdiff_t row, const T* from, int width, int rows, int lanes) {
  const int whole = lanes / kLanes<T> * kLanes<T>;
  for (int r = 0; r < rows; ++r, to += row, from += width) {
    for (int i = 0; i < whole; i += kLanes<T>) store(to + i, load(from + i));
    if (whole < lanes) store_first(to + whole, load(from + whole), lanes - whole);
  }
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::learnable_token_merge
