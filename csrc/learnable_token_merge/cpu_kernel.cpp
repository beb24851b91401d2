// Learnable token merging on one core, one instruction set.
//
// Floor: 2 N P (D + D') FLOPs an image, forward and for each of the gradients, at two FMAs a cycle; beside
// them each thread normalises a mask once (a shared one once in all), and the tokens are packed once a pass.
#include "mask_gradient_cpu.h"

namespace vitkernels::learnable_token_merge {
namespace VITKERNELS_ISA {
namespace {

template <class T>
int pitch_of(const Params& p) {
  return round_up_lanes<T>(static_cast<int>(p.merged_tokens));
}

// Which slice of which operand an item is.
template <class T>
struct Slices {
  Panels<T> first, second;
  Slices(const Params& p, bool z, bool other) : first(z ? p.width : 0), second(other ? p.other_width : 0) {}
  int count() const { return first.groups + second.groups; }
};

template <class T>
struct ProductScratch {
  T *numbers, *weights, *left, *panels, *sums;
  size_t size;

  // depth: of the product; rows: of its result
  ProductScratch(const Params& p, int64_t depth, int64_t rows, bool packs_left, Scratch scratch) {
    const size_t pitch = pitch_of<T>(p), width = kPanelVecs * kLanes<T>;
    numbers = scratch.take<T>(3 * pitch);
    weights = scratch.take<T>(p.tokens * pitch);
    left = scratch.take<T>(packs_left ? p.tokens * pitch : 0);
    panels = scratch.take<T>(depth * width * kGroupPanels);
    sums = scratch.take<T>(rows * width);
    size = scratch.used;
  }
};

// One token's weights as part of a packed left operand, [group of merged tokens][token][merged token of the
// group].
template <class T>
VITKERNELS_INLINE void pack_weights(const T* weights, int token, int tokens, int merged, T* left) {
  const int whole = merged / kRows * kRows, rest = merged - whole;
  T* to = left + token * kRows;
  for (int r = 0; r < whole; r += kRows, to += static_cast<ptrdiff_t>(tokens) * kRows)
    __builtin_memcpy(to, weights + r, kRows * sizeof(T));
  to = left + static_cast<ptrdiff_t>(whole) * tokens + token * rest;
  for (int r = 0; r < rest; ++r) to[r] = weights[whole + r];
}

template <class E, class M, bool Forward>
void product_range(const Params& p, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  const int tokens = static_cast<int>(p.tokens), merged = static_cast<int>(p.merged_tokens);
  const int depth = Forward ? tokens : merged, rows = Forward ? merged : tokens, pitch = pitch_of<T>(p);
  const ProductScratch<T> w(p, depth, rows, Forward, Scratch(memory));
  const Slices<T> slices(p, Forward || p.grad_z, p.other && (Forward || p.grad_other));
  int64_t filled = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / slices.count(), mask_of = p.g.stride[0] == 0 ? 0 : b;
    int group = static_cast<int>(item % slices.count());
    if (filled != mask_of) {
      const Mask<M, T> mask(p, mask_of);
      T* kept = nullptr;
      if (Forward && p.divisors && group == 0 && (p.g.stride[0] || b == 0))
        kept = static_cast<T*>(p.divisors.data) + b * p.divisors.stride[0];
      fill_weights<E, M, T>(mask, w.numbers, kept, w.weights, pitch, [&](int token, const T* weights) {
        if (Forward) pack_weights(weights, token, tokens, merged, w.left);
      });
      filled = mask_of;
    }
    const bool second = group >= slices.first.groups;
    if (second) group -= slices.first.groups;
    const Panels<T>& panels = second ? slices.second : slices.first;
    const View& from = Forward ? (second ? p.other : p.z) : (second ? p.grad_y_other : p.grad_y);
    const View& to = Forward ? (second ? p.y_other : p.y) : (second ? p.grad_other : p.grad_z);
    const int begin_panel = panels.panel(group), end_panel = panels.panel(group + 1);
    if (from)
      pack_panels<E, T>(w.panels, static_cast<const E*>(from.data) + b * from.stride[0], from.stride[1],
                        depth, panels, begin_panel, end_panel);
    const T* packed = w.panels;
    for (int panel = begin_panel; panel < end_panel; ++panel) {
      const int first = panels.vec(panel) * L, vecs = panels.vec(panel + 1) - panels.vec(panel);
      const int width = vecs * L, lanes = imin(width, panels.lanes - first);
      E* target = static_cast<E*>(to.data) + b * to.stride[0] + first;
      Product<T> product{
          rows, from ? depth : 0, Forward ? w.left : w.weights, pitch, 1, packed, width, nullptr, 0, w.sums,
          width};
      packed += static_cast<ptrdiff_t>(depth) * width;
      bool in_place = false;
      if constexpr (kSame<E, T>) {
        in_place = lanes == width;
        if (in_place) {
          product.c = target;
          product.c_row = to.stride[1];
        }
      }
      multiply_panel<T>(vecs, product, Forward);
      if (!in_place) write_panel<E, T>(target, to.stride[1], w.sums, width, rows, lanes);
    }
  }
}

// ---- by dtype

bool wide(const Params& p) {
  return p.dtype == DType::f64;
}

int64_t forward_items(const Params& p) {
  return p.batch * (wide(p) ? Slices<double>(p, true, bool(p.other)).count()
                            : Slices<float>(p, true, bool(p.other)).count());
}
size_t forward_scratch(const Params& p) {
  return wide(p) ? ProductScratch<double>(p, p.tokens, p.merged_tokens, true, Scratch(nullptr)).size
                 : ProductScratch<float>(p, p.tokens, p.merged_tokens, true, Scratch(nullptr)).size;
}
void forward(const Params& p, int64_t begin, int64_t end, void* scratch, void*) {
  with_dtypes(p.dtype, p.mask_dtype,
              [&](auto e, auto m) { product_range<decltype(e), decltype(m), true>(p, begin, end, scratch); });
}

int64_t tokens_items(const Params& p) {
  const bool z = bool(p.grad_z), other = bool(p.grad_other);
  return p.batch * (wide(p) ? Slices<double>(p, z, other).count() : Slices<float>(p, z, other).count());
}
size_t tokens_scratch(const Params& p) {
  return wide(p) ? ProductScratch<double>(p, p.merged_tokens, p.tokens, false, Scratch(nullptr)).size
                 : ProductScratch<float>(p, p.merged_tokens, p.tokens, false, Scratch(nullptr)).size;
}
void tokens(const Params& p, int64_t begin, int64_t end, void* scratch, void*) {
  with_dtypes(p.dtype, p.mask_dtype, [&](auto e, auto m) {
    product_range<decltype(e), decltype(m), false>(p, begin, end, scratch);
  });
}

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel = {{forward_items, forward_scratch, forward},
                           {tokens_items, tokens_scratch, tokens},
                           {sums_items, sums_scratch, sums},
                           {chain_items, chain_scratch, chain},
                           shared_size};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::learnable_token_merge
