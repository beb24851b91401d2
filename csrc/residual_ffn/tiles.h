// Tiles of tokens through tensor cores: both products in one launch (fused), or each in its own.
#pragma once
#include "tensor.h"

namespace vitkernels::residual_ffn {

using tile_attention::Carver;
using tile_attention::Product;
using tile_attention::ProductTile;
using tile_attention::TensorCores;
using tile_attention::Weights;

constexpr int WARPS = THREADS / 32;

// What becomes of a pair of sums of the first product, of columns n + offset and the next.
template <class T>
struct StoreHidden {
  const float *scale, *bias;
  T* hidden;
  int ld;

  VK_DEVICE void operator()(int row, int n, int offset, float left, float right) const {
    const int column = n + offset;
    const auto factor = Vec<float, 2>::load(scale + column), shift = Vec<float, 2>::load(bias + column);
    Vec<T, 2>{
        {from_float<T>(relu(left * factor[0] + shift[0])), from_float<T>(relu(right * factor[1] + shift[1]))}}
        .store(hidden + row * ld + column);
  }
};

// And of the second: u becomes the result in place, since nobody else has these two.
template <class T>
struct AddToInputs {
  const float *scale, *bias;
  T* u;
  int ld;

  VK_DEVICE void operator()(int row, int n, int offset, float left, float right) const {
    const int column = n + offset;
    const auto factor = Vec<float, 2>::load(scale + column), shift = Vec<float, 2>::load(bias + column);
    const auto before = Vec<T, 2>::load(u + row * ld + column);
    Vec<T, 2>{{from_float<T>(to_float(before[0]) + (left * factor[0] + shift[0])),
               from_float<T>(to_float(before[1]) + (right * factor[1] + shift[1]))}}
        .store(u + row * ld + column);
  }
};

// How a call of either launch of `tiles` is cut: tokens, rows of the weight, and the depth that is staged.
struct Tiles {
  int row_bits = 0, columns = 0, depth = 0;
  double time = 0;  // in nanoseconds, by the model of way.h; 0: none fits
};

struct FusedLayout {
  int row_bits;
  int ld_u, ld_hidden;
  int u, hidden;
  int vectors;  // scale1, bias1, scale2, bias2
  int taps;     // where the hidden layer comes to lie
  ProductTile tile;
  int64_t bytes;

  FusedLayout(const Params& p, int row_bits, int depth) : row_bits(row_bits) {
    const int rows = 1 << row_bits;
    tile = ProductTile::choose(rows, THREADS / 32, p.hidden > p.channels ? p.hidden : p.channels, depth);
    ld_u = leading_dimension<half_t>(p.channels);
    ld_hidden = leading_dimension<half_t>(p.hidden);
    const int hidden_bytes = rows * ld_hidden * 2, taps_bytes = 4 * taps_elements(p);
    Carver carver;
    u = carver.take<half_t>(rows * ld_u);
    hidden = taps = carver.take<char>(hidden_bytes > taps_bytes ? hidden_bytes : taps_bytes);
    vectors = carver.take<float>(2 * (p.hidden + p.channels));
    tile.buffers = carver.take<half_t>(2 * tile.elements);
    bytes = carver.used();
  }
};

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 2) forward_fused_kernel(Problem problem, FusedLayout layout) {
  const Params& p = problem.params;
  char* shared = shared_memory();
  T *u = reinterpret_cast<T*>(shared + layout.u), *hidden = reinterpret_cast<T*>(shared + layout.hidden);
  auto *scale1 = reinterpret_cast<float*>(shared + layout.vectors), *bias1 = scale1 + p.hidden,
       *scale2 = bias1 + p.hidden, *bias2 = scale2 + p.channels;
  auto* taps = reinterpret_cast<float*>(shared + layout.taps);
  Product<T> product(layout.tile, shared);
  const int rows = 1 << layout.row_bits;
  const int64_t first = static_cast<int64_t>(block_x()) << layout.row_bits;

  stage_taps<T>(taps, problem);
  stage_vector<T>(scale1, problem, p.scale1, 0, p.hidden);
  stage_vector<T>(bias1, problem, p.bias1, 0, p.hidden);
  stage_vector<T>(scale2, problem, p.scale2, 0, p.channels);
  stage_vector<T>(bias2, problem, p.bias2, 0, p.channels);
  cp_async_commit();
  const Weights weight1{p.weight1.data, p.weight1.stride[0], p.weight1.stride[1], p.hidden, p.channels};
  const Weights weight2{p.weight2.data, p.weight2.stride[0], p.weight2.stride[1], p.channels, p.hidden};
  product.template start<true>(weight1);
  make_inputs<T>(u, layout.ld_u, problem, first, layout.row_bits, taps, [] {
    cp_async_wait<1>();
    sync_block();
  });

  product.template run<true>(u, layout.ld_u, rows, weight1,
                             StoreHidden<T>{scale1, bias1, hidden, layout.ld_hidden}, [](int, int) {});
  product.template start<true>(weight2);
  product.template run<true>(hidden, layout.ld_hidden, rows, weight2,
                             AddToInputs<T>{scale2, bias2, u, layout.ld_u}, [](int, int) {});
  sync_block();

  store_outputs(u, layout.ld_u, problem, first, layout.row_bits, 0, p.channels);
}

// The workspace: the hidden layer [tokens][hidden], then u [tokens][channels].
template <class T>
VK_DEVICE T* workspace_u(const Problem& problem) {
  return static_cast<T*>(problem.params.workspace) + problem.tokens * problem.params.hidden;
}

// Of either launch: 2^row_bits tokens and `columns` rows of the weight.
struct TilesLayout {
  int row_bits, columns;
  int ld_left, ld_result;
  int left, result;
  int taps;     // where the result comes to lie
  int vectors;  // scale, bias
  ProductTile tile;
  int64_t bytes;

  TilesLayout(const Tiles& tiles, int depth_of_product, int taps_count)
      : row_bits(tiles.row_bits), columns(tiles.columns) {
    const int rows = 1 << row_bits;
    tile = ProductTile::choose(rows, THREADS / 32, columns, tiles.depth);
    ld_left = leading_dimension<half_t>(depth_of_product);
    ld_result = leading_dimension<half_t>(columns);
    const int result_bytes = rows * ld_result * 2, taps_bytes = 4 * taps_count;
    Carver carver;
    left = carver.take<half_t>(rows * ld_left);
    result = taps = carver.take<char>(result_bytes > taps_bytes ? result_bytes : taps_bytes);
    vectors = carver.take<float>(2 * columns);
    tile.buffers = carver.take<half_t>(2 * tile.elements);
    bytes = carver.used();
  }
};

// `rows` rows of a dense matrix with `width` columns from row `first` and column `column` on: `count` of
// them, a multiple of 8, to or from a tile. Rows beyond the last token are zeros, or skipped.
template <class T>
VK_DEVICE void load_dense(T* tile, int ld, const Problem& problem, const T* matrix, int64_t first, int width,
                          int column, int count, int rows) {
  VK_NO_UNROLL
  for (int row = warp_id(); row < rows; row += WARPS) {
    const bool valid = first + row < problem.tokens;
    const T* source = matrix + (valid ? (first + row) * width + column : 0);
    VK_NO_UNROLL
    for (int k = 8 * lane_id(); k < count; k += 8 * 32) cp_async16(tile + row * ld + k, source + k, valid);
  }
}
template <class T>
VK_DEVICE void store_dense(T* matrix, const Problem& problem, const T* tile, int ld, int64_t first, int width,
                           int column, int count, int rows) {
  VK_NO_UNROLL
  for (int row = warp_id(); row < rows && first + row < problem.tokens; row += WARPS) {
    T* target = matrix + (first + row) * width + column;
    VK_NO_UNROLL
    for (int k = 8 * lane_id(); k < count; k += 8 * 32)
      Vec<T, 8>::load(tile + row * ld + k).store(target + k);
  }
}

// Some rows of a weight.
template <class T>
VK_DEVICE Weights rows_of(const View& weight, int first, int rows, int columns) {
  return {static_cast<const T*>(weight.data) + first * weight.stride[0], weight.stride[0], weight.stride[1],
          rows, columns};
}

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 2) forward_expand_tiles_kernel(Problem problem, TilesLayout layout) {
  const Params& p = problem.params;
  char* shared = shared_memory();
  T *u = reinterpret_cast<T*>(shared + layout.left), *result = reinterpret_cast<T*>(shared + layout.result);
  auto *scale1 = reinterpret_cast<float*>(shared + layout.vectors), *bias1 = scale1 + layout.columns,
       *taps = reinterpret_cast<float*>(shared + layout.taps);
  Product<T> product(layout.tile, shared);
  const int rows = 1 << layout.row_bits, first_column = block_y() * layout.columns;
  const int columns = p.hidden - first_column < layout.columns ? p.hidden - first_column : layout.columns;
  const int64_t first = static_cast<int64_t>(block_x()) << layout.row_bits;

  admit_launch();
  stage_taps<T>(taps, problem);
  stage_vector<T>(scale1, problem, p.scale1, first_column, columns);
  stage_vector<T>(bias1, problem, p.bias1, first_column, columns);
  cp_async_commit();
  const Weights weight1 = rows_of<T>(p.weight1, first_column, columns, p.channels);
  product.template start<true>(weight1);
  make_inputs<T>(u, layout.ld_left, problem, first, layout.row_bits, taps, [] {
    cp_async_wait<1>();
    sync_block();
  });
  product.template run<true>(u, layout.ld_left, rows, weight1,
                             StoreHidden<T>{scale1, bias1, result, layout.ld_result}, [](int, int) {});
  // The blocks of the same tokens share the copying of u, by channels.
  const int blocks = (p.hidden + layout.columns - 1) / layout.columns, chunks = p.channels / 8;
  const int begin = block_y() * chunks / blocks * 8, end = (block_y() + 1) * chunks / blocks * 8;
  store_dense(workspace_u<T>(problem), problem, u + begin, layout.ld_left, first, p.channels, begin,
              end - begin, rows);
  sync_block();
  store_dense(static_cast<T*>(p.workspace), problem, result, layout.ld_result, first, p.hidden, first_column,
              columns, rows);
}

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 2)
    forward_contract_tiles_kernel(Problem problem, TilesLayout layout) {
  const Params& p = problem.params;
  char* shared = shared_memory();
  T *hidden = reinterpret_cast<T*>(shared + layout.left),
    *result = reinterpret_cast<T*>(shared + layout.result);
  auto *scale2 = reinterpret_cast<float*>(shared + layout.vectors), *bias2 = scale2 + layout.columns;
  Product<T> product(layout.tile, shared);
  const int rows = 1 << layout.row_bits, first_column = block_y() * layout.columns;
  const int columns = p.channels - first_column < layout.columns ? p.channels - first_column : layout.columns;
  const int64_t first = static_cast<int64_t>(block_x()) << layout.row_bits;

  stage_vector<T>(scale2, problem, p.scale2, first_column, columns);
  stage_vector<T>(bias2, problem, p.bias2, first_column, columns);
  const Weights weight2 = rows_of<T>(p.weight2, first_column, columns, p.hidden);
  product.template start<true>(weight2);
  wait_for_launch();
  load_dense(hidden, layout.ld_left, problem, static_cast<const T*>(p.workspace), first, p.hidden, 0,
             p.hidden, rows);
  load_dense(result, layout.ld_result, problem, workspace_u<T>(problem), first, p.channels, first_column,
             columns, rows);
  cp_async_commit();
  product.template run<true>(hidden, layout.ld_left, rows, weight2,
                             AddToInputs<T>{scale2, bias2, result, layout.ld_result}, [](int, int) {});
  sync_block();
  store_outputs(result, layout.ld_result, problem, first, layout.row_bits, first_column, columns);
}

}  // namespace vitkernels::residual_ffn
