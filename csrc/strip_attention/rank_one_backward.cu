// Gradients of softmax(s q k^T) v for one channel a query and a key. See rank_one.h for the idea and the
// floor.
//
// With G = grad_out v^T and A the probabilities, d loss / d score = A (G - delta), delta_n = sum_m A G -
// grad_lse_n. The kernel whose warps own queries sees whole rows of A and G, so it needs neither out nor lse:
// with P = exp(score - one of the row) it sums P, P k, P G and P G k, of which delta, the normaliser and
// grad_q are made. It leaves delta and the normaliser for the kernel whose warps own keys. Every sum has one
// owner and a fixed order. Keys are so few that the second kernel divides the queries among blocks
// (`chunks`), whose partial sums a third adds.
#include "rank_one.h"

namespace vitkernels::strip_attention::rank_one {
namespace {

// What the kernel of the keys is told about a query: delta without grad_lse (where G equals delta, as it does
// with one key, no rounding may be left beside grad_lse), log(sum P).
template <class T>
using Row = Vec<accumulate_t<T>, 2>;

template <class T>
VK_DEVICE accumulate_t<T>* row_of(const Call& call, const Unit& unit, int token) {
  return static_cast<accumulate_t<T>*>(call.rows) + 2 * (unit.index * call.queries + token);
}

// Blocks of an SM that the registers must allow.
template <class T, int COLUMNS, int STRIPS>
constexpr int MIN_BLOCKS = std::is_floating_point_v<T> ? 2
                           : COLUMNS * STRIPS > 64     ? 3
                                                       : 4;

template <class T, int COLUMNS, int STRIPS>
VK_KERNEL void VK_LAUNCH_BOUNDS(BLOCK_THREADS, (std::is_floating_point_v<T> ? 2 : 4))
    queries_kernel(Call call, KeyLayout<T> layout) {
  using Acc = accumulate_t<T>;
  using Exp = Exponential<T>;
  const QueryItem item(call);
  const Unit& unit = item.unit;
  const int ld = layout.ld;
  const int g = lane_id() / 4, t = lane_id() % 4;
  T* const slab = reinterpret_cast<T*>(shared_memory() + layout.slabs) + warp_id() * layout.slab_rows * ld;
  const Acc scale = static_cast<Acc>(call.scale), unit_scale = static_cast<Acc>(call.scale * Exp::unit);

  KeyTiles<T> tiles(call, layout, unit, item.end - item.begin);
  const Extremes<Acc> extremes =
      find_extremes<T>(call, unit, reinterpret_cast<Acc*>(shared_memory() + layout.scratch));

  Rows<T, COLUMNS, STRIPS> grad_out;
  for (int tile = item.begin; tile < item.end; ++tile) {
    int first = (tile * WARPS + warp_id()) * 16 * STRIPS;
    grad_out.load(unit.matrix<T>(call.grad_out, call.value_dim), first, call.queries, slab, ld);
    Acc q[2 * STRIPS], origin[2 * STRIPS];
    Acc sum_p[2 * STRIPS], sum_k[2 * STRIPS], sum_g[2 * STRIPS], sum_gk[2 * STRIPS];
    VK_UNROLL
    for (int r = 0; r < 2 * STRIPS; ++r) {
      const int token = first + 8 * r + g;
      q[r] = token < call.queries ? to_accumulate(unit.scalar<T>(call.q, token)) * unit_scale : Acc(0);
      origin[r] = extremes.origin(q[r]);
      sum_p[r] = sum_k[r] = sum_g[r] = sum_gk[r] = Acc(0);
    }

    for (int k = 0; k < call.keys; k += TILE) {
      tiles.next(k / TILE);
      if (first >= call.queries) continue;
      const int here = call.keys - k < TILE ? call.keys - k : TILE;
      VK_NO_UNROLL
      for (int m = 0; m < here; m += 16) {
        Acc products[STRIPS][2][4];
        grad_out.multiply(products, tiles.values() + m * ld, ld);
        const Acc* const keys = tiles.keys() + m + 2 * t;
        const auto low = Vec<Acc, 2>::load(keys), high = Vec<Acc, 2>::load(keys + 8);
        const Acc key[4] = {low[0], low[1], high[0], high[1]};
        VK_UNROLL
        for (int r = 0; r < 2 * STRIPS; ++r) {
          Acc part_p = Acc(0), part_k = Acc(0), part_g = Acc(0), part_gk = Acc(0);
          VK_UNROLL
          for (int c = 0; c < 4; ++c) {
            // The gradient does not change with the origin of the keys; how much cancels in it does.
            const Acc shifted = key[c] - origin[r], p = Exp::exp(q[r] * shifted);
            const Acc pg = p * products[r / 2][c / 2][r % 2 * 2 + c % 2];
            part_g += pg;
            part_gk += pg * shifted;
            // A key that does not exist has values, and so a G, of zero.
            if (m + 2 * t + c % 2 + c / 2 * 8 < here) {
              part_p += p;
              part_k += p * shifted;
            }
          }
          sum_p[r] += part_p;
          sum_k[r] += part_k;
          sum_g[r] += part_g;
          sum_gk[r] += part_gk;
        }
      }
    }

    forget(first);  // lest addresses wait in registers for the end of the loop
    VK_UNROLL
    for (int r = 0; r < 2 * STRIPS; ++r) {
      const int token = first + 8 * r + g;
      const Acc total = warp_sum<4>(sum_p[r]), factor = Acc(1) / total;
      const Acc mean_k = warp_sum<4>(sum_k[r]) * factor, mean_g = warp_sum<4>(sum_g[r]) * factor;
      const Acc mean_gk = warp_sum<4>(sum_gk[r]) * factor;
      if (t != 0 || token >= call.queries) continue;
      const Acc grad_lse = present(call.grad_lse) ? unit.scalar<Acc>(call.grad_lse, token) : Acc(0);
      if (present(call.grad_q))
        unit.scalar<T>(call.grad_q, token) =
            from_accumulate<T>(scale * (mean_gk - mean_g * mean_k + grad_lse * (mean_k + origin[r])));
      Row<T>{{mean_g, Exp::log(total)}}.store(row_of<T>(call, unit, token));
    }
  }
}

// Tiles of queries and of grad_out stream through two buffers.
template <class T>
struct QueryLayout {
  using Acc = accumulate_t<T>;
  int ld;
  int grads, queries, rows, slabs, steps, scratch;
  int grad_bytes;  // of a buffer
  int slab_rows;
  int64_t bytes;

  QueryLayout(const Call& call, int slab_rows)
      : ld(leading_dimension<T>(call.value_dim)),
        grad_bytes(TILE * ld * static_cast<int>(sizeof(T))),
        slab_rows(slab_rows) {
    Carver carver;
    grads = carver.take<T>(2 * TILE * ld);
    queries = carver.take<Vec<Acc, 2>>(2 * TILE);
    rows = carver.take<Row<T>>(2 * TILE);
    slabs = carver.take<T>(WARPS * slab_rows * ld);
    steps = carver.take<T>(WARPS * STEP<T>);
    scratch = carver.take<Acc>(2 * WARPS);
    bytes = carver.used();
  }
};

// Partial sums: of grad_v [units][chunks][keys][pitch], in pairs of columns, then of grad_k, [units][chunks]
// [keys].
VK_HOST_DEVICE int partial_pitch(int value_dim) {
  return round_up(value_dim, 2);
}
template <class T>
VK_DEVICE accumulate_t<T>* partials_k(const Call& call) {
  return static_cast<accumulate_t<T>*>(call.partials) +
         call.units * call.chunks * call.keys * partial_pitch(call.value_dim);
}

template <class T, int COLUMNS, int STRIPS>
VK_KERNEL void VK_LAUNCH_BOUNDS(BLOCK_THREADS, (MIN_BLOCKS<T, COLUMNS, STRIPS>))
    keys_kernel(Call call, QueryLayout<T> layout) {
  using Acc = accumulate_t<T>;
  using Exp = Exponential<T>;
  constexpr bool PARTS = std::is_floating_point_v<T>;
  const int chunk = block_x() % call.chunks, whole = block_x() / call.chunks;
  const Unit unit(call, whole / call.tiles);
  int warp = warp_id();
  int first = (whole % call.tiles * WARPS + warp) * 16 * STRIPS;
  const int ld = layout.ld, blocks = round_up(call.value_dim, 16) / 8;
  const int g = lane_id() / 4, t = lane_id() % 4;
  const auto slab = [&](int row) {
    return reinterpret_cast<T*>(shared_memory() + layout.slabs) + (warp * layout.slab_rows + row) * ld;
  };
  T* const step = reinterpret_cast<T*>(shared_memory() + layout.steps) + warp_id() * STEP<T>;
  const auto grads = [&](int turn) {
    return reinterpret_cast<T*>(shared_memory() + layout.grads + (turn & 1) * layout.grad_bytes);
  };
  // Of each query q' and grad_lse, and its row.
  const auto of_queries = [&](int offset, int turn) {
    return reinterpret_cast<Acc*>(shared_memory() + offset) + (turn & 1) * 2 * TILE;
  };

  const Extremes<Acc> extremes =
      find_extremes<T>(call, unit, reinterpret_cast<Acc*>(shared_memory() + layout.scratch));
  const auto stage = [&](int tile) {
    load_tile(grads(tile), ld, unit.matrix<T>(call.grad_out, call.value_dim), Group<TILE>(), [&](int slot) {
      const int token = tile * TILE + slot;
      return token < call.queries ? token : -1;
    });
    cp_async_commit();
    if (thread_x() >= TILE) return;
    const int token = tile * TILE + thread_x();
    Acc q = Acc(0), grad_lse = Acc(0);
    Row<T> row{{Acc(0), INFINITY}};  // no query: probabilities of zero
    if (token < call.queries) {
      q = to_accumulate(unit.scalar<T>(call.q, token)) * static_cast<Acc>(call.scale * Exp::unit);
      if (present(call.grad_lse)) grad_lse = unit.scalar<Acc>(call.grad_lse, token);
      row = Row<T>::load(row_of<T>(call, unit, token));
    }
    Vec<Acc, 2>{{q, grad_lse}}.store(of_queries(layout.queries, tile) + 2 * thread_x());
    row.store(of_queries(layout.rows, tile) + 2 * thread_x());
  };

  const int begin = chunk * call.tiles_per_chunk, all = tiles_of(call.queries, TILE);
  const int end = begin + call.tiles_per_chunk < all ? begin + call.tiles_per_chunk : all;
  stage(begin);
  Rows<T, COLUMNS, STRIPS> values;
  values.load(unit.matrix<T>(call.v, call.value_dim), first, call.keys, slab(0), ld);
  Acc key[2 * STRIPS], grad_k[2 * STRIPS];
  VK_UNROLL
  for (int r = 0; r < 2 * STRIPS; ++r) {
    const int token = first + 8 * r + g;
    key[r] = token < call.keys ? to_accumulate(unit.scalar<T>(call.k, token)) : extremes.smallest;
    grad_k[r] = Acc(0);
  }
  Acc grad_v[STRIPS][COLUMNS / 8][4];
  clear_all(grad_v);

  for (int tile = begin; tile < end; ++tile) {
    cp_async_wait<0>();
    sync_block();  // the tile is there for all, and all are done with the other buffer
    if (tile + 1 < end) stage(tile + 1);
    if (first >= call.keys) continue;
    const int here = call.queries - tile * TILE < TILE ? call.queries - tile * TILE : TILE;
    Acc of_tile[STRIPS][COLUMNS / 8][4];
    if (PARTS) clear_all(of_tile);
    VK_NO_UNROLL
    for (int n = 0; n < here; n += 16) {
      const T* const grad_out = grads(tile) + n * ld;
      Acc products[STRIPS][2][4], p[STRIPS][2][4];
      values.multiply(products, grad_out, ld);
      Acc part[PARTS ? 2 * STRIPS : 1] = {};
      auto& sum = [&]() -> auto& {
        if constexpr (PARTS) {
          return part;
        } else {
          return grad_k;
        }
      }();
      VK_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int column = n + c / 2 * 8 + 2 * t + c % 2;
        const auto query = Vec<Acc, 2>::load(of_queries(layout.queries, tile) + 2 * column);
        const auto row = Row<T>::load(of_queries(layout.rows, tile) + 2 * column);
        const Acc origin = extremes.origin(query[0]);
        VK_UNROLL
        for (int r = 0; r < 2 * STRIPS; ++r) {
          const Acc value = Exp::exp(query[0] * (key[r] - origin) - row[1]);
          p[r / 2][c / 2][r % 2 * 2 + c % 2] = value;
          sum[r] += value * (products[r / 2][c / 2][r % 2 * 2 + c % 2] - row[0] + query[1]) * query[0];
        }
      }
      for (int r = 0; PARTS && r < 2 * STRIPS; ++r) grad_k[r] += part[r];
      multiply_step(PARTS ? of_tile : grad_v, p, step, grad_out, ld, blocks);
    }
    if (PARTS) add(grad_v, of_tile);
  }

  // Lest addresses wait in registers for the end of the loop.
  forget(first);
  forget(warp);
  // The queries came times unit.
  VK_UNROLL
  for (int r = 0; r < 2 * STRIPS; ++r) grad_k[r] = warp_sum<4>(grad_k[r]) * static_cast<Acc>(1.0 / Exp::unit);
  if (call.chunks == 1) {
    VK_UNROLL
    for (int r = 0; r < 2 * STRIPS; ++r) {
      const int token = first + 8 * r + g;
      if (t == 0 && token < call.keys && present(call.grad_k))
        unit.scalar<T>(call.grad_k, token) = from_accumulate<T>(grad_k[r]);
    }
    if (!present(call.grad_v)) return;
    sync_warp();  // the slab may hold the values
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s) write_sums(slab(16 * s), ld, grad_v[s], blocks, Acc(1), Acc(1));
    sync_warp();
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s) {
      store_tile(unit.matrix<T>(call.grad_v, call.value_dim), slab(16 * s), ld, Group<16>(), [&](int slot) {
        const int token = first + 16 * s + slot;
        return token < call.keys ? token : -1;
      });
    }
    return;
  }
  const int pitch = partial_pitch(call.value_dim);
  const int64_t rows = (unit.index * call.chunks + chunk) * call.keys;
  VK_UNROLL
  for (int r = 0; r < 2 * STRIPS; ++r) {
    const int token = first + 8 * r + g;
    if (token >= call.keys) continue;
    if (t == 0) partials_k<T>(call)[rows + token] = grad_k[r];
    Acc* const partial_v = static_cast<Acc*>(call.partials) + (rows + token) * pitch;
    VK_UNROLL
    for (int j = 0; j < COLUMNS / 8; ++j) {
      const int column = 8 * j + 2 * t;
      const auto& sums = grad_v[r / 2][j];
      if (column < pitch) Vec<Acc, 2>{{sums[r % 2 * 2], sums[r % 2 * 2 + 1]}}.store(partial_v + column);
    }
  }
}

constexpr int REDUCE_THREADS = 256;

// A thread for each element of grad_v, and one more a row for that of grad_k.
template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(REDUCE_THREADS, 1) reduce_kernel(Call call) {
  using Acc = accumulate_t<T>;
  const int width = call.value_dim + 1, pitch = partial_pitch(call.value_dim);
  const int64_t index = static_cast<int64_t>(block_x()) * REDUCE_THREADS + thread_x(), row = index / width;
  if (row >= call.units * call.keys) return;
  const int column = static_cast<int>(index - row * width);
  const Unit unit(call, row / call.keys);
  const int token = static_cast<int>(row - unit.index * call.keys);
  const bool of_key = column == call.value_dim;
  const View& target = of_key ? call.grad_k : call.grad_v;
  if (!present(target)) return;
  const int64_t first = unit.index * call.chunks * call.keys + token;
  const Acc* partials =
      of_key ? partials_k<T>(call) + first : static_cast<const Acc*>(call.partials) + first * pitch + column;
  const int64_t stride = static_cast<int64_t>(call.keys) * (of_key ? 1 : pitch);
  Acc sum = Acc(0);
  for (int chunk = 0; chunk < call.chunks; ++chunk) sum += partials[chunk * stride];
  (&unit.scalar<T>(target, token))[of_key ? 0 : column * target.stride[3]] = from_accumulate<T>(sum);
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

// A Row for each query.
int64_t row_bytes(const Call& call) {
  return 2 * call.units * call.queries * static_cast<int64_t>(sizeof(float));
}

}  // namespace

int64_t backward_workspace(const Params& params) {
  Call call(params);
  split_keys(&call, 16 * WARPS * strips(params.dtype, call.keys, call.value_dim));
  if (call.chunks == 1) return row_bytes(call);
  return row_bytes(call) + call.units * call.chunks * call.keys * (partial_pitch(call.value_dim) + 1) *
                               static_cast<int64_t>(sizeof(float));
}

void backward(const Params& params, Stream stream) {
  Call call(params);
  call.rows = params.workspace;
  call.partials = static_cast<char*>(params.workspace) + row_bytes(call);
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
    launch(reduce_kernel<T>, Dim3{(elements + REDUCE_THREADS - 1) / REDUCE_THREADS}, REDUCE_THREADS, 0,
           stream, call);
  });
}

}  // namespace vitkernels::strip_attention::rank_one
