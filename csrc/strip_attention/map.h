// Strip attention as a map of the tile-attention core: every query meets every key, and a bias of its own may
// be added to each logit. The core runs what rank_one.h does not: several channels a query and a key, a bias,
// float and double.
//
// Tensor cores take r up to 16 in one step of padded channels, an eighth of the work of 64 value channels:
// r fused multiply-adds a logit would cost more from r = 2 on.
//
// Floor per batch entry and head for N queries and M keys: (N + M) (r + dv) sizeof(T) bytes, 2 N M (r + dv)
// FLOPs, N M exponentials, and with a bias of full size its N M elements; backward:
// tile_attention_backward.h.
#pragma once
#include "strip_attention.h"
#include "vitkernels/tile_attention_backward.h"

namespace vitkernels::strip_attention {

template <class T>
struct StripMap {
  using Acc = accumulate_t<T>;

  int queries, keys;
  View bias, grad_bias;  // absent: none
  bool wide_bias, wide_grad_bias;
  int64_t bias_offset = 0, grad_bias_offset = 0;  // of the batch entry and head at hand

  explicit StripMap(const Params& params)
      : queries(static_cast<int>(params.queries)),
        keys(static_cast<int>(params.keys)),
        bias(params.bias),
        grad_bias(params.grad_bias),
        wide_bias(params.bias_dtype != params.dtype),
        wide_grad_bias(params.grad_bias_dtype != params.dtype) {}

  VK_DEVICE void enter(int batch, int head) {
    bias_offset = batch * bias.stride[0] + head * bias.stride[1];
    grad_bias_offset = batch * grad_bias.stride[0] + head * grad_bias.stride[1];
  }

  VK_HOST_DEVICE bool fits_small_tile() const { return queries <= 16 && keys <= 16; }
  VK_HOST_DEVICE int query_tiles(int rows) const { return (queries + rows - 1) / rows; }
  VK_HOST_DEVICE int key_tiles(int rows) const { return (keys + rows - 1) / rows; }
  VK_DEVICE int key_tiles_of(int rows, int) const { return key_tiles(rows); }
  VK_DEVICE int query_tiles_of(int rows, int) const { return query_tiles(rows); }
  VK_DEVICE tile_attention::Run query_run(int rows, int tile) const {
    return tile_attention::Run::of(queries, rows, tile);
  }
  VK_DEVICE tile_attention::Run key_run(int rows, int, int i) const {
    return tile_attention::Run::of(keys, rows, i);
  }
  VK_HOST_DEVICE int query_count() const { return queries; }
  VK_DEVICE int query(int rows, int tile, int slot) const {
    const int token = tile * rows + slot;
    return token < queries ? token : -1;
  }
  VK_DEVICE int key(int rows, int tile, int slot) const {
    const int token = tile * rows + slot;
    return token < keys ? token : -1;
  }
  VK_DEVICE int key_of(int rows, int, int i, int slot) const { return key(rows, i, slot); }
  VK_DEVICE int query_of(int rows, int, int i, int slot) const { return query(rows, i, slot); }

  VK_DEVICE int query_code(int token) const { return token; }
  using KeyCode = int;
  VK_DEVICE int key_code(int token) const { return token; }
  VK_DEVICE static int no_key() { return tile_attention::INVALID; }
  struct Query {
    int64_t row;  // of the bias
  };
  VK_DEVICE Query of_query(int query) const { return {bias_offset + query * bias.stride[2]}; }
  VK_DEVICE Acc logit(Acc s, Query query, int key, const Acc*) const {
    if (key == no_key()) return -INFINITY;
    if (!tile_attention::present(bias)) return s;
    const int64_t at = query.row + key * bias.stride[3];
    const Acc value = wide_bias ? static_cast<const Acc*>(bias.data)[at]
                                : to_accumulate(static_cast<const T*>(bias.data)[at]);
    return s + value * static_cast<Acc>(tile_attention::Exponential<T>::unit);
  }

  VK_HOST_DEVICE int shared_elements() const { return 0; }
  VK_DEVICE void stage(Acc*, int64_t, int, int) const {}

  // A pair's gradient is a result and no sum: each tile's go where they belong.
  VK_HOST_DEVICE int gradient_elements() const { return 0; }
  VK_DEVICE void gradient(Acc*, const tile_attention::GradientTile<Acc, KeyCode>& tile) const {
    const int first_query = tile.query_tile * tile.rows, first_key = tile.key_tile * tile.rows;
    VK_NO_UNROLL
    for (int i = tile.thread; i < tile.rows * tile.rows; i += tile.threads) {
      const int row = i / tile.rows, column = i % tile.rows;
      if (first_query + row >= queries || first_key + column >= keys) continue;
      const int64_t at = grad_bias_offset + (first_query + row) * grad_bias.stride[2] +
                         (first_key + column) * grad_bias.stride[3];
      const Acc value = tile.values[row * tile.ld + column];
      if (wide_grad_bias) {
        static_cast<Acc*>(grad_bias.data)[at] = value;
      } else {
        static_cast<T*>(grad_bias.data)[at] = from_accumulate<T>(value);
      }
    }
  }
};

// Throws where a size is beyond the kernels.
inline tile_attention::Problem make_problem(const Params& params) {
  if (params.queries > 0x7fffff00 || params.keys > 0x7fffff00)
    throw std::runtime_error("strip attention: there must be fewer than 2^31 - 256 queries and keys");
  struct Named : Params {
    int head_dim;
    explicit Named(const Params& params) : Params(params), head_dim(params.key_dim) {}
  };
  tile_attention::Problem problem = tile_attention::make_problem(Named(params), "strip attention");
  problem.gradient_partials = params.grad_bias.data;  // not where they go, but that they are wanted
  return problem;
}

}  // namespace vitkernels::strip_attention
