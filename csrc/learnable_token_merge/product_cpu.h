// The products of learnable token merging on the CPU, by panels of three vectors.
//
// The right operand is packed, panel by panel, [panel][depth][lanes of the panel]: a panel stays in L1 while
// the rows of the left operand go by.
#pragma once
#include "mask_cpu.h"

namespace vitkernels::learnable_token_merge {
namespace VITKERNELS_ISA {

constexpr int kPanelVecs = 3, kRows = max_rows(kPanelVecs);
constexpr int kGroupPanels = 4;  // panels of an item
#if defined(__FMA__) || defined(__aarch64__)
constexpr int kTerms = 256;  // of one chain of sums
#else
constexpr int kTerms = 32;
#endif

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

template <class T, int V>
VITKERNELS_INLINE void multiply_group(const Product<T>& p) {
  multiply_rows<T, V, kRows>(p, p.rows, 0, 0);
}

// Rows of the left operand by one panel of `vecs` vectors. The left operand's groups of kRows rows are
// `group_step` apart.
template <class T>
static void multiply_panel(int vecs, Product<T> p, ptrdiff_t group_step) {
  const int rows = p.rows;
  for (int row = 0; row < rows; row += kRows) {
    p.rows = imin(kRows, rows - row);
    Product<T> part = p;
    // A product of no terms is one run: it has zeros to store.
    for (int runs = p.depth ? ceil_div(p.depth, kTerms) : 1, k = 0; runs > 0; --runs, k += part.depth) {
      part.depth = ceil_div(p.depth - k, runs);
      part.a = p.a + k * p.a_k;
      part.b = p.b + k * p.b_k;
      if (vecs == 3)
        multiply_group<T, 3>(part);
      else if (vecs == 2)
        multiply_group<T, 2>(part);
      else
        multiply_group<T, 1>(part);
      part.add = part.c;
      part.add_row = part.c_row;
    }
    p.a += group_step;
    p.c += kRows * p.c_row;
    if (p.add) p.add += kRows * p.add_row;
  }
}

// Packs `rows` rows of the lanes [first, first + vecs * L) of a matrix into a panel; `left` of them exist.
template <class E, class T>
VITKERNELS_INLINE void pack_panel(T* to, const E* from, ptrdiff_t row, int rows, int vecs, int left) {
  const int width = vecs * kLanes<T>;
  pack(to, width, from, row, 1, rows, imin(width, left), T(1));
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
