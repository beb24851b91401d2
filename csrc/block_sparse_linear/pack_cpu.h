// Operands into the layouts that product_cpu.h describes, in the compute type.
#pragma once
#include "gelu_cpu.h"
#include "product_cpu.h"

namespace vitkernels::block_sparse_linear::VITKERNELS_ISA {

template <class E>
VITKERNELS_INLINE const E* row_of(const View& view, int64_t row) {
  return static_cast<const E*>(view.data) + row * view.stride[0];
}

// What reaches `count` features of one token, from grad_y and what the forward pass kept.
template <class E, class T>
VITKERNELS_INLINE Vec<T> through(Activation activation, Vec<T> grad, const E* kept, int count) {
  if (activation == Activation::none) return grad;
  const Vec<T> z = count == kLanes<T> ? load(kept) : load_first(kept, count);
  if (activation == Activation::gelu) return grad * gelu_slope<T>(z);
  // PyTorch's ReLU passes nothing on at 0 and everything at NaN.
  return z <= T(0) ? Vec<T>{} : grad;
}

// Tokens [begin, end) of `from` into to [block][token][width], blocks `block_step` apart; `kept` are an
// activation's.
template <class E, class T, Activation A>
static void pack_tokens(const View& from, const View& kept, int features, int block, int64_t begin,
                        int64_t end, T* to, ptrdiff_t block_step) {
  constexpr int L = kLanes<T>;
  const int width = round_up_lanes<T>(block);
  for (int64_t n = begin; n < end; ++n) {
    const E* row = row_of<E>(from, n);
    const E* kept_row = A == Activation::none ? nullptr : row_of<E>(kept, n);
    T* target = to + (n - begin) * width;
    for (int first = 0; first < features; first += block, target += block_step) {
      const int count = imin(block, features - first), whole = count / L * L;
      const E* source = row + first;
      const E* z = A == Activation::none ? nullptr : kept_row + first;
      for (int i = 0; i < whole; i += L) store(target + i, through<E, T>(A, load(source + i), z + i, L));
      if (whole < count)
        store(target + whole,
              through<E, T>(A, load_first(source + whole, count - whole), z + whole, count - whole));
      for (int i = round_up_lanes<T>(count); i < width; i += L) store(target + i, Vec<T>{});
    }
  }
}

// Blocks [begin, end) of a row of blocks, into the row's panels.
template <class E, class T>
static void pack_row(const Params& p, const Side& side, int group, int begin, int end, T* to) {
  constexpr int L = kLanes<T>;
  const int padded = round_up_lanes<T>(side.lanes), lanes = side.lanes_of(group);
  const int first = side.pointers[group], count = side.pointers[group + 1] - first;
  for (int q = begin; q < end; ++q) {
    const int64_t block = side.order ? side.order[first + q] : first + q;
    const E* from =
        static_cast<const E*>(p.values.data) + block * p.block_height * static_cast<int64_t>(p.block_width);
    const int depth = side.depth_of(side.ids[first + q]);
    for (int lane = 0; lane < padded; lane += kPanelVecs * L) {
      const int width = imin(kPanelVecs * L, padded - lane);
      T* panel = to + static_cast<ptrdiff_t>(count) * side.depth * lane +
                 static_cast<ptrdiff_t>(q) * side.depth * width;
      const int real = imin(width, lanes - lane);
      // Lanes beyond the features are computed and thrown away: zeros, lest a NaN make them slow.
      if (real < width)
        for (int i = 0; i < depth * width; i += L) store(panel + i, Vec<T>{});
      if (real > 0)
        pack(panel, width, from + lane * side.lane_stride, side.depth_stride, side.lane_stride, depth, real,
             T(1));
    }
  }
}

// Elements of the packed blocks of a row of so many.
template <class T>
VITKERNELS_INLINE ptrdiff_t row_size(const Side& side, int64_t blocks) {
  return static_cast<ptrdiff_t>(blocks) * round_up_lanes<T>(side.lanes) * side.depth;
}

// Stored blocks at places [begin, end) of the side's order.
template <class E, class T>
static void pack_weights(const Params& p, const Side& side, int64_t begin, int64_t end, T* to) {
  for (int g = 0; g < side.groups; ++g) {
    const int64_t first = side.pointers[g], last = side.pointers[g + 1];
    if (first < end && last > begin)
      pack_row<E, T>(p, side, g, static_cast<int>(begin > first ? begin - first : 0),
                     static_cast<int>((end < last ? end : last) - first), to + row_size<T>(side, first));
  }
}

}  // namespace vitkernels::block_sparse_linear::VITKERNELS_ISA
