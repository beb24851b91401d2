// The product of packed features with packed blocks, a tile of tokens by lanes at a time.
//
// Features are packed by blocks, [block][token of the slice][width], width a multiple of the vector and zeros
// beyond the features: a tile reads a few short rows that lie together, whatever the tensor's strides.
// Weights are packed by rows of blocks, [row of blocks][panel][block of the row][depth][lanes of the panel],
// in the order in which a tile reads them. Forward, the lanes are the rows of W and the depth its columns;
// backward the reverse.
#pragma once
#include "cpu_kernel.h"
#include "vitkernels/matrix_cpu.h"

namespace vitkernels::block_sparse_linear::VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

// Rows of a tile whose panel has one vector or two.
template <int V>
constexpr int kRows = V == 1                   ? 12
                      : kVectorRegisters == 32 ? 12
                                               : 6;
constexpr int kMaxRows = 12, kPanelVecs = 2;

// Terms of one chain of sums: longer sums are cut, between blocks or within one that is longer itself, which
// keeps the rounding error near that of a blocked library product. Shorter without FMA, where a term rounds
// twice.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int kTerms = 192;
#else
constexpr int kTerms = 32;
#endif

// One direction through the blocks. `lanes` and `depth` are the block's extents.
struct Side {
  const int32_t *pointers, *ids, *order;  // order: the stored block at a place; null: the place itself
  int groups, blocks;                     // blocks of lanes and of depth
  int lanes, depth;
  int lane_count, depth_count;  // features in all
  ptrdiff_t lane_stride, depth_stride;

  // by_rows: lanes are the rows of W
  Side(const Params& p, bool by_rows) {
    const Index index(p.index, p.block_rows, p.block_cols, p.nnz);
    pointers = by_rows ? index.crow : index.crow_t;
    ids = by_rows ? index.col : index.row_t;
    order = by_rows ? nullptr : index.perm_t;
    groups = by_rows ? p.block_rows : p.block_cols;
    blocks = by_rows ? p.block_cols : p.block_rows;
    lanes = by_rows ? p.block_height : p.block_width;
    depth = by_rows ? p.block_width : p.block_height;
    lane_count = by_rows ? p.out_features : p.in_features;
    depth_count = by_rows ? p.in_features : p.out_features;
    lane_stride = by_rows ? p.block_width : 1;
    depth_stride = by_rows ? 1 : p.block_width;
  }

  int depth_of(int block) const { return imin(depth, depth_count - block * depth); }
  int lanes_of(int group) const { return imin(lanes, lane_count - group * lanes); }
};

// How the features of a tile lie: the distances between blocks and between the tokens of a block, and the
// depth of a block; the block at the edge is shorter.
struct Source {
  ptrdiff_t block_step, token_step;
  int depth, last_block, last_depth;
};

template <class T, int V, int R>
VITKERNELS_INLINE void multiply_term(Vec<T> (&acc)[R][V], const T* a, ptrdiff_t step, const T* b) {
  Vec<T> bv[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) bv[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vec<T> av = broadcast(a[r * step]);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] += av * bv[v];
  }
}

// sums[r][lane] = (add ? sums[r][lane] : 0) + the terms of `count` blocks of one panel: block ids[q] of the
// features, whose block 0 begins at `features` for the tile's first token, times the panel's weights.
template <class T, int V, int R>
static __attribute__((noinline)) void multiply_run(const Source& source, const T* features, const T* weights,
                                                   const int32_t* ids, int count, T* sums, bool add) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};

  const ptrdiff_t step = source.token_step;
  for (int q = 0; q < count; ++q) {
    const int id = ids[q];
    const T* a = features + id * source.block_step;
    const T* b = weights + static_cast<ptrdiff_t>(q) * source.depth * (V * L);
    // The next block's features lie elsewhere, in a place that the processor cannot foresee.
    const T* next = features + ids[q + 1 < count ? q + 1 : q] * source.block_step;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(next + r * step);
      __builtin_prefetch(next + r * step + source.depth - 1);
    }
    // Four terms at a time: loops of 32 end less predictably than loops of 8.
    int k = id == source.last_block ? source.last_depth : source.depth;
    for (; k >= 4; k -= 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u, ++a, b += V * L) multiply_term<T, V, R>(acc, a, step, b);
    }
    for (; k > 0; --k, ++a, b += V * L) multiply_term<T, V, R>(acc, a, step, b);
  }

  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += load(sums + (r * V + v) * L);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(sums + (r * V + v) * L, acc[r][v]);
}

template <class T, int V, int R = kRows<V>>
VITKERNELS_INLINE void multiply_tokens(const Source& source, const T* features, const T* weights,
                                       const int32_t* ids, int count, int rows, T* sums, bool add) {
  if (rows == R)
    multiply_run<T, V, R>(source, features, weights, ids, count, sums, add);
  else if constexpr (R > 1)
    multiply_tokens<T, V, R - 1>(source, features, weights, ids, count, rows, sums, add);
}

// How the blocks of a row are cut into chains of sums: the first `longer` of them take one block more.
struct Runs {
  int count, blocks, longer;

  Runs(int all, int depth) {
    const int most = depth >= kTerms ? 1 : kTerms / depth;
    count = ceil_div(all, most);
    blocks = count ? all / count : 0;
    longer = count ? all % count : 0;
  }
};

// Blocks of more than kTerms terms, each by equal parts.
template <class T, int V>
static __attribute__((noinline)) void multiply_long_blocks(const Source& source, const T* features,
                                                           const T* weights, const int32_t* ids, int count,
                                                           int rows, T* sums) {
  bool add = false;
  for (int q = 0; q < count; ++q, weights += static_cast<ptrdiff_t>(source.depth) * (V * kLanes<T>)) {
    const int depth = ids[q] == source.last_block ? source.last_depth : source.depth;
    Source part = source;
    for (int parts = ceil_div(depth, kTerms), k = 0; parts > 0; --parts, k += part.depth, add = true) {
      part.depth = part.last_depth = ceil_div(depth - k, parts);
      multiply_tokens<T, V>(part, features + k, weights + static_cast<ptrdiff_t>(k) * (V * kLanes<T>),
                            ids + q, 1, rows, sums, add);
    }
  }
}

// All blocks of a panel: sums [rows][V vectors] of the tile, zeros where the row of blocks is empty.
template <class T, int V>
VITKERNELS_INLINE void multiply_panel(const Source& source, const T* features, const T* weights,
                                      const int32_t* ids, const Runs& runs, int rows, T* sums) {
  if (runs.count == 0) {
    for (int i = 0; i < rows * V; ++i) store(sums + i * kLanes<T>, Vec<T>{});
    return;
  }
  if (source.depth > kTerms)
    return multiply_long_blocks<T, V>(source, features, weights, ids, runs.count, rows, sums);
  for (int i = 0; i < runs.count; ++i) {
    const int count = runs.blocks + (i < runs.longer);
    multiply_tokens<T, V>(source, features, weights, ids, count, rows, sums, i > 0);
    weights += static_cast<ptrdiff_t>(count) * source.depth * (V * kLanes<T>);
    ids += count;
  }
}

}  // namespace vitkernels::block_sparse_linear::VITKERNELS_ISA
