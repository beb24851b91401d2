// Gradients of softmax(s q k^T) v for one channel a query and a key. See rank_one.h for the idea and the
// floor.
//
// With G = grad_out v^T and A the probabilities, d loss / d score = A (G - delta), delta_n = sum_m A G -
// grad_lse_n. The kernel whose warps own queries sees whole rows of A and G, so it needs neither out nor lse:
// with P = exp(score - maximum) it sums P, P k, P G and P G k, of which delta, the normaliser and grad_q are
// made. It leaves delta and the normaliser for the kernel whose warps own keys. Every sum has one owner and a
// fixed order. Keys are so few that the second kernel divides the queries among blocks (`chunks`), whose
// partial sums a third adds.
#include "rank_one.h"

namespace vitkernels::strip_attention::rank_one {
namespace {

// What the kernel of the keys is told about a query.
using Row = Vec<float, 2>;  // delta, log2(sum P)

// 16 rows of an operand from a warp's slab to registers, `depth` blocks of 16 channels.
template <int DEPTH>
VK_DEVICE void load_fragments(uint32_t (&fragments)[DEPTH][4], const void* slab, int ld, int depth) {
  const char* row = static_cast<const char*>(slab) + ((lane_id() & 15) * ld + (lane_id() >> 4) * 8) * 2;
  VK_UNROLL
  for (int c = 0; c < DEPTH; ++c) {
    if (c >= depth) break;
    ldmatrix_x4(fragments[c], row + 32 * c);
  }
}

// The products of 16 rows in registers with 16 rows of a tile, over all channels.
template <class T, int STRIPS, int DEPTH>
VK_DEVICE void multiply_rows(float (&products)[STRIPS][2][4], const uint32_t (&left)[STRIPS][DEPTH][4],
                             const T* tile, int ld, int depth) {
  const int lane = lane_id();
  tile += ((lane & 7) + (lane >> 4) * 8) * ld + ((lane >> 3) & 1) * 8;
  VK_UNROLL
  for (int s = 0; s < STRIPS; ++s) tile_attention::clear(products[s]);
  VK_UNROLL
  for (int c = 0; c < DEPTH; ++c) {
    if (c >= depth) break;
    uint32_t right[4];
    ldmatrix_x4(right, tile + 16 * c);
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s) {
      mma_m16n8k16<T>(products[s][0], left[s][c], {right[0], right[1]});
      mma_m16n8k16<T>(products[s][1], left[s][c], {right[2], right[3]});
    }
  }
}

// Rows `first` and on of a tensor of a unit, those of a warp, to its slab and from there to registers.
template <class T, int STRIPS, int DEPTH>
VK_DEVICE void load_rows(uint32_t (&fragments)[STRIPS][DEPTH][4], const Matrix<T>& source, int first, int count,
                         T* slab, int ld) {
  VK_UNROLL
  for (int s = 0; s < STRIPS; ++s) {
    load_tile(slab + 16 * s * ld, ld, source, Group<16>(), [&](int slot) {
      const int token = first + 16 * s + slot;
      return token < count ? token : -1;
    });
  }
  cp_async_commit();
  cp_async_wait<0>();
  sync_warp();
  VK_UNROLL
  for (int s = 0; s < STRIPS; ++s)
    load_fragments(fragments[s], slab + 16 * s * ld, ld, round_up(source.channels, 16) / 16);
  sync_warp();  // before the slab is filled anew
}

template <class T, int COLUMNS, int STRIPS>
VK_KERNEL void VK_LAUNCH_BOUNDS(BLOCK_THREADS, 4) queries_kernel(Call call, KeyLayout<T> layout) {
  const QueryItem item(call);
  const Unit& unit = item.unit;
  const int ld = layout.ld, depth = round_up(call.value_dim, 16) / 16;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  T* const slab = reinterpret_cast<T*>(shared_memory() + layout.slabs) + warp_id() * layout.slab_rows * ld;
  const float unit_scale = call.scale * LOG2E;

  KeyTiles<T> tiles(call, layout, unit, item.end - item.begin);
  const Extremes extremes =
      find_extremes<T>(call, unit, reinterpret_cast<float*>(shared_memory() + layout.scratch));

  for (int tile = item.begin; tile < item.end; ++tile) {
    const int first = (tile * WARPS + warp_id()) * 16 * STRIPS;
    uint32_t grad_out[STRIPS][COLUMNS / 16][4];
    load_rows(grad_out, unit.matrix<T>(call.grad_out, call.value_dim), first, call.queries, slab, ld);
    float q[2 * STRIPS], extreme[2 * STRIPS];
    float sum_p[2 * STRIPS], sum_k[2 * STRIPS], sum_g[2 * STRIPS], sum_gk[2 * STRIPS];
    VK_UNROLL
    for (int r = 0; r < 2 * STRIPS; ++r) {
      const int token = first + 8 * r + g;
      q[r] = token < call.queries ? to_float(unit.scalar<T>(call.q, token)) * unit_scale : 0.0f;
      extreme[r] = extremes.of(q[r]);
      sum_p[r] = sum_k[r] = sum_g[r] = sum_gk[r] = 0.0f;
    }

    for (int k = 0; k < call.keys; k += TILE) {
      tiles.next(k / TILE);
      if (first >= call.queries) continue;
      const int here = call.keys - k < TILE ? call.keys - k : TILE;
      VK_NO_UNROLL
      for (int m = 0; m < here; m += 16) {
        float products[STRIPS][2][4];
        multiply_rows<T>(products, grad_out, tiles.values() + m * ld, ld, depth);
        const float* const keys = tiles.keys() + m + 2 * t;
        const auto low = Vec<float, 2>::load(keys), high = Vec<float, 2>::load(keys + 8);
        const float key[4] = {low[0], low[1], high[0], high[1]};
        VK_UNROLL
        for (int r = 0; r < 2 * STRIPS; ++r) {
          VK_UNROLL
          for (int c = 0; c < 4; ++c) {
            // Keys are taken from the extreme one on: the gradient does not change, and where few keys near
            // it have all the weight nothing cancels.
            const float shifted = key[c] - extreme[r], p = exp2_fast(q[r] * shifted);
            const float pg = p * products[r / 2][c / 2][r % 2 * 2 + c % 2];
            sum_g[r] += pg;
            sum_gk[r] += pg * shifted;
            // A key that does not exist has values, and so a G, of zero.
            if (m + 2 * t + c % 2 + c / 2 * 8 < here) {
              sum_p[r] += p;
              sum_k[r] += p * shifted;
            }
          }
        }
      }
    }

    VK_UNROLL
    for (int r = 0; r < 2 * STRIPS; ++r) {
      const int token = first + 8 * r + g;
      const float total = warp_sum<4>(sum_p[r]), factor = 1.0f / total;
      const float mean_k = warp_sum<4>(sum_k[r]) * factor, mean_g = warp_sum<4>(sum_g[r]) * factor;
      const float mean_gk = warp_sum<4>(sum_gk[r]) * factor;
      if (t != 0 || token >= call.queries) continue;
      const float grad_lse = present(call.grad_lse) ? unit.scalar<float>(call.grad_lse, token) : 0.0f;
      if (present(call.grad_q))
        unit.scalar<T>(call.grad_q, token) = from_float<T>(
            call.scale * (mean_gk - mean_g * mean_k + grad_lse * (mean_k + extreme[r])));
      Row{{mean_g - grad_lse, log2_fast(total)}}.store(call.rows + 2 * (unit.index * call.queries + token));
    }
  }
}

// Tiles of queries and of grad_out stream through two buffers.
template <class T>
struct QueryLayout {
  int ld;
  int grads, columns, slabs, scratch;
  int grad_bytes;  // of a buffer
  int slab_rows;
  int64_t bytes;

  QueryLayout(const Call& call, int slab_rows)
      : ld(leading_dimension<T>(call.value_dim)),
        grad_bytes(TILE * ld * static_cast<int>(sizeof(T))),
        slab_rows(slab_rows) {
    Carver carver;
    grads = carver.take<T>(2 * TILE * ld);
    columns = carver.take<Vec<float, 4>>(2 * TILE);
    slabs = carver.take<T>(WARPS * slab_rows * ld);
    scratch = carver.take<float>(2 * WARPS);
    bytes = carver.used();
  }
};

// Partial sums of grad_v are rows of this many floats, in pairs.
VK_HOST_DEVICE int partial_pitch(int value_dim) {
  return round_up(value_dim, 2);
}

// Blocks of an SM that the registers must allow.
template <int COLUMNS, int STRIPS>
constexpr int KEYS_MIN_BLOCKS = COLUMNS * STRIPS > 64 ? 3 : 4;

template <class T, int COLUMNS, int STRIPS>
VK_KERNEL void VK_LAUNCH_BOUNDS(BLOCK_THREADS, (KEYS_MIN_BLOCKS<COLUMNS, STRIPS>))
    keys_kernel(Call call, QueryLayout<T> layout) {
  const int chunk = block_x() % call.chunks, whole = block_x() / call.chunks;
  const Unit unit(call, whole / call.tiles);
  const int first = (whole % call.tiles * WARPS + warp_id()) * 16 * STRIPS;
  const int ld = layout.ld, depth = round_up(call.value_dim, 16) / 16;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  T* const slab = reinterpret_cast<T*>(shared_memory() + layout.slabs) + warp_id() * layout.slab_rows * ld;
  auto* const columns = reinterpret_cast<Vec<float, 4>*>(shared_memory() + layout.columns);
  const auto grads = [&](int turn) {
    return reinterpret_cast<T*>(shared_memory() + layout.grads + (turn & 1) * layout.grad_bytes);
  };
  const float unit_scale = call.scale * LOG2E;

  const Extremes extremes =
      find_extremes<T>(call, unit, reinterpret_cast<float*>(shared_memory() + layout.scratch));
  const auto stage = [&](int tile, int turn) {
    load_tile(grads(turn), ld, unit.matrix<T>(call.grad_out, call.value_dim), Group<TILE>(), [&](int slot) {
      const int token = tile * TILE + slot;
      return token < call.queries ? token : -1;
    });
    cp_async_commit();
    if (thread_x() >= TILE) return;
    const int token = tile * TILE + thread_x();
    Vec<float, 4> column{{0.0f, extremes.smallest, INFINITY, 0.0f}};  // no query: probabilities of zero
    if (token < call.queries) {
      const Row row = Row::load(call.rows + 2 * (unit.index * call.queries + token));
      column[0] = to_float(unit.scalar<T>(call.q, token)) * unit_scale;
      column[1] = extremes.of(column[0]);
      column[2] = row[1];
      column[3] = row[0];
    }
    column.store(reinterpret_cast<float*>(columns + (turn & 1) * TILE + thread_x()));
  };

  const int begin = chunk * call.tiles_per_chunk, all = tiles_of(call.queries, TILE);
  const int end = begin + call.tiles_per_chunk < all ? begin + call.tiles_per_chunk : all;
  stage(begin, begin);
  uint32_t values[STRIPS][COLUMNS / 16][4];
  load_rows(values, unit.matrix<T>(call.v, call.value_dim), first, call.keys, slab, ld);
  float key[2 * STRIPS], grad_k[2 * STRIPS];
  VK_UNROLL
  for (int r = 0; r < 2 * STRIPS; ++r) {
    const int token = first + 8 * r + g;
    key[r] = token < call.keys ? to_float(unit.scalar<T>(call.k, token)) : extremes.smallest;
    grad_k[r] = 0.0f;
  }
  float grad_v[STRIPS][COLUMNS / 8][4];
  VK_UNROLL
  for (int s = 0; s < STRIPS; ++s) tile_attention::clear(grad_v[s]);

  for (int tile = begin; tile < end; ++tile) {
    cp_async_wait<0>();
    sync_block();  // the tile is there for all, and all are done with the other buffer
    if (tile + 1 < end) stage(tile + 1, tile + 1);
    if (first >= call.keys) continue;
    const int here = call.queries - tile * TILE < TILE ? call.queries - tile * TILE : TILE;
    const T* const grad_out = grads(tile);
    VK_NO_UNROLL
    for (int n = 0; n < here; n += 16) {
      float products[STRIPS][2][4];
      multiply_rows<T>(products, values, grad_out + n * ld, ld, depth);
      uint32_t left[STRIPS][4];
      VK_UNROLL
      for (int half = 0; half < 2; ++half) {
        float p[2 * STRIPS][2];
        VK_UNROLL
        for (int c = 0; c < 2; ++c) {
          const auto column = Vec<float, 4>::load(
              reinterpret_cast<const float*>(columns + (tile & 1) * TILE + n + 8 * half + 2 * t + c));
          VK_UNROLL
          for (int r = 0; r < 2 * STRIPS; ++r) {
            p[r][c] = exp2_fast(column[0] * (key[r] - column[1]) - column[2]);
            grad_k[r] += p[r][c] * (products[r / 2][half][r % 2 * 2 + c] - column[3]) * column[0];
          }
        }
        VK_UNROLL
        for (int r = 0; r < 2 * STRIPS; ++r) left[r / 2][r % 2 + 2 * half] = pack2<T>(p[r][0], p[r][1]);
      }
      const T* const right_rows = grad_out + (n + (lane & 15)) * ld + (lane >> 4) * 8;
      VK_UNROLL
      for (int j = 0; j < COLUMNS / 8; j += 2) {
        if (j >= 2 * depth) break;
        uint32_t right[4];
        ldmatrix_x4_trans(right, right_rows + j * 8);
        VK_UNROLL
        for (int s = 0; s < STRIPS; ++s) {
          mma_m16n8k16<T>(grad_v[s][j], left[s], {right[0], right[1]});
          mma_m16n8k16<T>(grad_v[s][j + 1], left[s], {right[2], right[3]});
        }
      }
    }
  }

  // The queries came times scale log2(e).
  VK_UNROLL
  for (int r = 0; r < 2 * STRIPS; ++r) grad_k[r] = warp_sum<4>(grad_k[r]) * LN2;
  if (call.chunks == 1) {
    VK_UNROLL
    for (int r = 0; r < 2 * STRIPS; ++r) {
      const int token = first + 8 * r + g;
      if (t == 0 && token < call.keys && present(call.grad_k))
        unit.scalar<T>(call.grad_k, token) = from_float<T>(grad_k[r]);
    }
    if (!present(call.grad_v)) return;
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s)
      tile_attention::write_sums(slab + 16 * s * ld, ld, grad_v[s], 2 * depth, 1.0f, 1.0f);
    sync_warp();
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s) {
      store_tile(unit.matrix<T>(call.grad_v, call.value_dim), slab + 16 * s * ld, ld, Group<16>(), [&](int slot) {
        const int token = first + 16 * s + slot;
        return token < call.keys ? token : -1;
      });
    }
    return;
  }
  const int pitch = partial_pitch(call.value_dim);
  const int64_t rows = (unit.index * call.chunks + chunk) * call.keys;
  float* const partial_k = call.partials + call.units * call.chunks * call.keys * pitch + rows;
  VK_UNROLL
  for (int r = 0; r < 2 * STRIPS; ++r) {
    const int token = first + 8 * r + g;
    if (token >= call.keys) continue;
    if (t == 0) partial_k[token] = grad_k[r];
    float* const partial_v = call.partials + (rows + token) * pitch;
    VK_UNROLL
    for (int j = 0; j < COLUMNS / 8; ++j) {
      const int column = 8 * j + 2 * t;
      const auto& sums = grad_v[r / 2][j];
      if (column < pitch) Vec<float, 2>{{sums[r % 2 * 2], sums[r % 2 * 2 + 1]}}.store(partial_v + column);
    }
  }
}

constexpr int REDUCE_THREADS = 256;

// A thread for each element of grad_v, and one more a row for that of grad_k.
template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(REDUCE_THREADS, 1) reduce_kernel(Call call) {
  const int width = call.value_dim + 1, pitch = partial_pitch(call.value_dim);
  const int64_t index = static_cast<int64_t>(block_x()) * REDUCE_THREADS + thread_x(), row = index / width;
  if (row >= call.units * call.keys) return;
  const int column = static_cast<int>(index - row * width);
  const Unit unit(call, row / call.keys);
  const int token = static_cast<int>(row % call.keys);
  const bool of_key = column == call.value_dim;
  const View& target = of_key ? call.grad_k : call.grad_v;
  if (!present(target)) return;
  const int64_t first = unit.index * call.chunks * call.keys + token;
  const float* partials = of_key ? call.partials + call.units * call.chunks * call.keys * pitch + first
                                 : call.partials + first * pitch + column;
  const int64_t step = static_cast<int64_t>(call.keys) * (of_key ? 1 : pitch);
  float sum = 0.0f;
  for (int chunk = 0; chunk < call.chunks; ++chunk) sum += partials[chunk * step];
  T& element = of_key ? unit.scalar<T>(target, token)
                      : (&unit.scalar<T>(target, token))[column * target.stride[3]];
  element = from_float<T>(sum);
}

// Blocks that fill a large device. Beyond them, partial sums cost more than they bring.
constexpr int64_t ENOUGH_KEY_BLOCKS = 512;

// The call of the kernel of the keys, a function of the sizes only; returns the number of its blocks.
int64_t split_keys(Call* call, int rows) {
  call->tiles = tiles_of(call->keys, rows);
  const int64_t wanted = ENOUGH_KEY_BLOCKS / (call->units * call->tiles);
  const int all = tiles_of(call->queries, TILE), most = tiles_of(all, 2);
  call->chunks = static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
  call->tiles_per_chunk = tiles_of(all, call->chunks);
  call->chunks = tiles_of(all, call->tiles_per_chunk);
  return call->units * call->tiles * call->chunks;
}

int64_t floats_of_rows(const Call& call) {
  return 2 * call.units * call.queries;
}

}  // namespace

int64_t backward_workspace(const Params& params) {
  Call call(params);
  split_keys(&call, 16 * WARPS * strips(call.keys, call.value_dim));
  int64_t floats = floats_of_rows(call);
  if (call.chunks > 1) floats += call.units * call.chunks * call.keys * (partial_pitch(call.value_dim) + 1);
  return floats * static_cast<int64_t>(sizeof(float));
}

void backward(const Params& params, Stream stream) {
  Call call(params);
  call.rows = static_cast<float*>(params.workspace);
  call.partials = call.rows + floats_of_rows(call);
  with_shape(params.dtype, call.queries, call.value_dim, [&](auto zero, auto columns, auto strips) {
    using T = decltype(zero);
    constexpr int ROWS = 16 * decltype(strips)::value;
    const KeyLayout<T> layout(call, ROWS);
    Call queries = call;
    const int64_t blocks = split_queries(&queries, WARPS * ROWS);
    launch(queries_kernel<T, decltype(columns)::value, decltype(strips)::value>, Dim3{blocks}, BLOCK_THREADS,
           static_cast<size_t>(layout.bytes), stream, queries, layout);
  });
  if (!present(call.grad_k) && !present(call.grad_v)) return;
  with_shape(params.dtype, call.keys, call.value_dim, [&](auto zero, auto columns, auto strips) {
    using T = decltype(zero);
    constexpr int ROWS = 16 * decltype(strips)::value;
    const QueryLayout<T> layout(call, ROWS);
    const int64_t blocks = split_keys(&call, WARPS * ROWS);
    launch(keys_kernel<T, decltype(columns)::value, decltype(strips)::value>, Dim3{blocks}, BLOCK_THREADS,
           static_cast<size_t>(layout.bytes), stream, call, layout);
    if (call.chunks == 1) return;
    const int64_t elements = call.units * call.keys * (call.value_dim + 1);
    launch(reduce_kernel<T>, Dim3{(elements + REDUCE_THREADS - 1) / REDUCE_THREADS}, REDUCE_THREADS, 0, stream,
           call);
  });
}

}  // namespace vitkernels::strip_attention::rank_one
