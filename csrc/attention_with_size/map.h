// Proportional attention as a map of the tile-attention core: every query meets every key, whose logits are
// raised by the logarithm of its size.
//
// A key's code is that logarithm. It is taken once for each tile of queries that meets the key, while the
// tiles' copies are in flight, and costs an addition a logit.
//
// Floor per batch entry and head for N queries and M keys: (N + M) (d + dv) sizeof(T) bytes, 2 N M (d + dv)
// FLOPs, N M exponentials; backward: tile_attention_backward.h. Those of the attention without sizes: the
// sizes, read by each head, are 1 / (2 d) of the keys in 16 bits. Expected: the time of plain attention.
#pragma once
#include "attention_with_size.h"
#include "vitkernels/tile_attention_backward.h"

namespace vitkernels::attention_with_size {

template <class T>
struct SizeMap {
  using Acc = accumulate_t<T>;
  using KeyCode = Acc;
  static constexpr bool FEW_REGISTERS = true;

  int queries, keys;
  View size;
  int64_t size_offset = 0;  // of the batch entry at hand

  explicit SizeMap(const Params& params)
      : queries(static_cast<int>(params.queries)), keys(static_cast<int>(params.keys)), size(params.size) {}

  VK_DEVICE void enter(int batch, int) { size_offset = batch * size.stride[0]; }

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

  VK_DEVICE int query_code(int) const { return 0; }
  // -inf hides a key of size 0, and slots without a key: what is added to it is finite, or makes NaN of its
  // query whatever the others add.
  VK_DEVICE Acc key_code(int token) const {
    const Acc count = static_cast<const Acc*>(size.data)[size_offset + token * size.stride[1]];
    return log_(count) * static_cast<Acc>(tile_attention::Exponential<T>::unit);
  }
  struct Query {};
  VK_DEVICE Query of_query(int) const { return {}; }
  VK_DEVICE static Acc no_key() { return -INFINITY; }
  VK_DEVICE Acc logit(Acc s, Query, Acc log_size, const Acc*) const { return s + log_size; }

  VK_HOST_DEVICE int shared_elements() const { return 0; }
  VK_DEVICE void stage(Acc*, int64_t, int, int) const {}
  VK_HOST_DEVICE int gradient_elements() const { return 0; }
  VK_DEVICE void gradient(Acc*, const tile_attention::GradientTile<Acc, KeyCode>&) const {}
};

// Throws where a size is beyond the kernels.
inline tile_attention::Problem make_problem(const Params& params) {
  if (params.queries > 0x7fffff00 || params.keys > 0x7fffff00)
    throw std::runtime_error("attention with size: there must be fewer than 2^31 - 256 queries and keys");
  struct Named : Params {
    int head_dim;
    explicit Named(const Params& params) : Params(params), head_dim(params.key_dim) {}
  };
  return tile_attention::make_problem(Named(params), "attention with size");
}

}  // namespace vitkernels::attention_with_size
