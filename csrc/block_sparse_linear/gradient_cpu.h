// The gradients of the values and of bias, from the packed features of a slice of tokens.
#pragma once
#include "product_cpu.h"

namespace vitkernels::block_sparse_linear::VITKERNELS_ISA {

constexpr int kChain = 200;         // tokens of one chain of sums in the gradient of the values
constexpr int kSlice = 2 * kChain;  // tokens of a slice

// The tokens of a slice.
struct Range {
  int64_t first, count;

  // Slices are equal but for the last.
  Range(const Params& p, const Plan& plan, int64_t slice) : first(slice * plan.slice) {
    count = p.tokens - first < plan.slice ? p.tokens - first : plan.slice;
  }
};

template <class T, int V, int R = kRows<V>>
static void gradient_rows(const Product<T>& product, int rows) {
  for (int row = 0, groups = ceil_div(rows, R); groups > 0; --groups) {
    const int count = ceil_div(rows - row, groups);
    multiply_rows<T, V, R>(product, count, row, 0);
    row += count;
  }
}

// dV[a][c] += sum over the slice's tokens of u[token][a] v[token][c], for one stored block. `u` and `v` are
// the block's features in the slice; `sums` is memory for a block.
template <class E, class T>
static void gradient_block(const Params& p, int64_t block, int row, int col, const Range& slice, const T* u,
                           const T* v, T* sums) {
  constexpr int L = kLanes<T>;
  const int height = p.block_height, width = p.block_width;
  const int row_width = round_up_lanes<T>(height), col_width = round_up_lanes<T>(width);
  const int real_rows = imin(height, p.out_features - row * height);
  const int real_cols = imin(width, p.in_features - col * width);
  E* const to = static_cast<E*>(p.grad_values.data) + block * height * static_cast<int64_t>(width);
  const bool add = slice.first > 0;
  // Where a row of the block is whole vectors, the sums are made in place.
  bool in_place = false;
  if constexpr (kSame<E, T>) {
    in_place = width == col_width && real_cols == width;
    if (in_place)
      sums = to;
    else if (add)
      for (int r = 0; r < real_rows; ++r)
        for (int c = 0; c < real_cols; c += L)
          store(sums + r * col_width + c, load_first(to + r * width + c, imin(L, real_cols - c)));
  }
  Product<T> product{0, 0, u, 1, row_width, v, col_width, nullptr, col_width, sums, col_width};
  int64_t token = 0;
  for (int64_t chains = (slice.count + kChain - 1) / kChain; chains > 0; --chains) {
    product.depth = static_cast<int>((slice.count - token + chains - 1) / chains);
    for (int lane = 0; lane < col_width; lane += kPanelVecs * L) {
      Product<T> panel = product;
      panel.a = u + token * row_width;
      panel.b = v + token * col_width + lane;
      panel.c = sums + lane;
      panel.add = add || token > 0 ? panel.c : nullptr;
      if (col_width - lane >= kPanelVecs * L)
        gradient_rows<T, kPanelVecs>(panel, real_rows);
      else
        gradient_rows<T, 1>(panel, real_rows);
    }
    token += product.depth;
  }
  const bool empty = slice.count == 0;
  for (int r = in_place && !empty ? real_rows : 0; r < height; ++r) {
    const int count = r < real_rows && !empty ? real_cols : 0;
    const T* from = sums + static_cast<ptrdiff_t>(r) * col_width;
    E* row_to = to + static_cast<ptrdiff_t>(r) * width;
    for (int c = 0; c < count; c += L) store_first(row_to + c, load(from + c), imin(L, count - c));
    for (int c = count; c < width; ++c) store_one(row_to + c, T(0));
  }
}

// V vectors of features, summed over the tokens of a slice in chains.
template <class E, class T, int V>
static void gradient_bias(const T* grads, int width, const Range& slice, E* to, int count) {
  constexpr int L = kLanes<T>;
  Vec<T> all[V] = {};
  if (slice.first > 0)
    for (int v = 0; v < V; ++v)
      if (v * L < count) all[v] = load_first(to + v * L, imin(L, count - v * L));
  for (int64_t token = 0; token < slice.count; token += kChain) {
    const int64_t stop = token + kChain < slice.count ? token + kChain : slice.count;
    Vec<T> chain[V] = {};
    for (int64_t n = token; n < stop; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) chain[v] += load(grads + n * width + v * L);
    for (int v = 0; v < V; ++v) all[v] += chain[v];
  }
  for (int v = 0; v < V; ++v)
    if (v * L < count) store_first(to + v * L, all[v], imin(L, count - v * L));
}

template <class E, class T>
static void gradient_bias(const Params& p, const Side& side, int group, const Range& slice, const T* grads) {
  constexpr int L = kLanes<T>, V = 4;
  const int width = round_up_lanes<T>(side.lanes), count = side.lanes_of(group);
  E* to = static_cast<E*>(p.grad_bias.data) + static_cast<ptrdiff_t>(group) * side.lanes;
  for (int i = 0; i < count;) {
    if (width - i >= V * L) {
      gradient_bias<E, T, V>(grads + i, width, slice, to + i, count - i);
      i += V * L;
    } else {
      gradient_bias<E, T, 1>(grads + i, width, slice, to + i, count - i);
      i += L;
    }
  }
}

// A thread's share of the gradients of the values and of bias for a slice. The blocks are taken in the order
// of those of grad_y, whose sum goes into the gradient of bias when it is about to be read anyway.
template <class E, class T>
static void gradients(const Params& p, const Plan& plan, const Part& part, const T* inputs, const T* outputs,
                      T* sums) {
  const Side side(p, !p.transposed);
  const Range slice(p, plan, part.slice);
  const ptrdiff_t lane_step = static_cast<ptrdiff_t>(plan.slice) * round_up_lanes<T>(side.lanes);
  const ptrdiff_t depth_step = static_cast<ptrdiff_t>(plan.slice) * round_up_lanes<T>(side.depth);
  constexpr int kBlockCost = 16;  // of a block of the values, in sums for bias
  const int64_t all = p.nnz * kBlockCost + side.groups;
  const int64_t from = all * part.rank / part.size, to = all * (part.rank + 1) / part.size;
  for (int g = 0; g < side.groups; ++g) {
    int64_t cost = static_cast<int64_t>(side.pointers[g]) * kBlockCost + g;
    const T* grads = outputs + g * lane_step;
    if (p.grad_bias && cost >= from && cost < to) gradient_bias<E, T>(p, side, g, slice, grads);
    if (!p.grad_values) continue;
    ++cost;
    for (int place = side.pointers[g]; place < side.pointers[g + 1]; ++place, cost += kBlockCost) {
      if (cost < from || cost >= to) continue;
      const T* taken = inputs + side.ids[place] * depth_step;
      if (p.transposed)
        gradient_block<E, T>(p, side.order[place], side.ids[place], g, slice, taken, grads, sums);
      else
        gradient_block<E, T>(p, place, g, side.ids[place], slice, grads, taken, sums);
    }
  }
}

}  // namespace vitkernels::block_sparse_linear::VITKERNELS_ISA
