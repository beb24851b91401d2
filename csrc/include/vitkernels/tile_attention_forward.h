// Forward of the tile-attention core.
//
// Floor per batch entry and head, N queries and M keys of widths d, dv: (N (d + dv) + M (d + dv)) sizeof(T)
// bytes once, 2 N M (d + dv) FLOPs, N M exponentials. Small windows are bound by the bytes.
//
// Here for float and double; tensor cores have tile_attention_stream.h. A group keeps its queries in shared
// memory and its output rows in registers while the key tiles stream by; the values load during Q K^T and the
// softmax. Beyond that, loads overlap with the work of other blocks on the SM.
#pragma once
#include <cmath>

#include "vitkernels/tile_attention_stream.h"

namespace vitkernels::tile_attention {

// Blocks of an SM that the registers must allow: latency is hidden by other blocks.
constexpr int FORWARD_MIN_BLOCKS = 2;
template <class Engine, int COLUMNS, class Map>
VK_KERNEL void VK_LAUNCH_BOUNDS(BLOCK_THREADS, FORWARD_MIN_BLOCKS)
    forward_kernel(Problem problem, ForwardLayout<Engine> layout, Map map) {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  using Exp = Exponential<T>;
  using KeyCode = typename Map::KeyCode;
  constexpr int ROWS = Engine::ROWS, KEY_BLOCKS = ROWS / 8;
  constexpr Acc NOTHING = -INFINITY;

  const Group<ROWS> group;
  const int groups = block_dim_x() / Group<ROWS>::THREADS;
  const int64_t index = static_cast<int64_t>(block_x()) * groups + group.index;
  if (index >= problem.items()) return;
  const Item item = get_item(problem, index);
  const ForwardShared<Engine> shared(layout, shared_memory() + group.index * layout.bytes);
  KeyCode* const key_codes = static_cast<KeyCode*>(shared.key_codes);

  const int lane_row = group.first_row + lane_id() / 4, lane_column = lane_id() % 4 * 2;
  const int depth = round_up(problem.head_dim, 16);
  const int value_blocks = round_up(problem.value_dim, 16) / 8;
  const int key_tiles = map.key_tiles_of(ROWS, item.tile);
  const Acc scale = static_cast<Acc>(problem.scale * Exp::unit);
  // Forgotten from time to time, lest what follows from them (geometry, addresses) fill the registers.
  int tile = item.tile, head = item.head;
  const auto query = [&](int slot) {
    return token_of<Map>(shared.query_tokens, slot, [&](int slot) { return map.query(ROWS, tile, slot); });
  };
  const auto matrix = [&](const View& view, int batch, int channels) {
    return Matrix<T, Map>(view, map, batch, head, channels);
  };

  map.stage(shared.table, item.head, group.thread, Group<ROWS>::THREADS);
  if constexpr (SCATTERED<Map>) {
    for (int slot = group.thread; slot < ROWS; slot += Group<ROWS>::THREADS)
      shared.query_tokens[slot] = map.query(ROWS, tile, slot);
    group.sync();
  }
  int query_codes[2];
  VK_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int token = query(lane_row + 8 * r);
    query_codes[r] = map.query_code(token < 0 ? 0 : token);
  }

  for (int batch = item.batch_begin; batch < item.batch_end; ++batch) {
    enter(map, batch, item.head, 0);
    forget(tile);
    load_tile(shared.q, shared.ld_head, matrix(problem.q, batch, problem.head_dim), group, query);
    Acc output[COLUMNS / 8][4];
    clear(output);
    Acc row_max[2] = {NOTHING, NOTHING}, row_sum[2] = {Acc(0), Acc(0)};  // row_sum: of this lane's columns

    for (int i = 0; i < key_tiles; ++i) {
      forget(tile);
      forget(head);
      forget(query_codes[0]);
      forget(query_codes[1]);
      const auto code_of = [&](int token) { return token < 0 ? map.no_key() : map.key_code(token); };
      if constexpr (SCATTERED<Map>) {
        for (int slot = group.thread; slot < ROWS; slot += Group<ROWS>::THREADS) {
          const int token = map.key_of(ROWS, tile, i, slot);
          shared.key_tokens[slot] = token;
          key_codes[slot] = code_of(token);
        }
        group.sync();
      }
      const auto key = [&](int slot) {
        return token_of<Map>(shared.key_tokens, slot,
                             [&](int slot) { return map.key_of(ROWS, tile, i, slot); });
      };
      Span seen{0, ROWS};
      if constexpr (ROWS > 16) seen = Strips<Map>::keys_seen(map, ROWS, tile, i, group.first_row);
      load_tile(shared.k, shared.ld_head, matrix(problem.k, batch, problem.head_dim), group, key);
      cp_async_commit();
      load_tile(shared.v, shared.ld_value, matrix(problem.v, batch, problem.value_dim), group, key);
      cp_async_commit();
      if constexpr (!SCATTERED<Map>) {
        for (int slot = group.thread; slot < ROWS; slot += Group<ROWS>::THREADS)
          key_codes[slot] = code_of(key(slot));
      }
      cp_async_wait<1>();  // all but the values
      group.sync();

      Acc p[KEY_BLOCKS][4];
      clear(p);
      Engine::multiply_rows(p, shared.q + group.first_row * shared.ld_head, shared.ld_head, shared.k,
                            shared.ld_head, depth, seen);

      const typename Map::Query queries[2] = {map.of_query(query_codes[0]), map.of_query(query_codes[1])};
      Acc tile_max[2] = {NOTHING, NOTHING};
      VK_UNROLL
      for (int j = 0; j < KEY_BLOCKS; ++j) {
        if (8 * j + 8 <= seen.begin || 8 * j >= seen.end) continue;
        VK_UNROLL
        for (int c = 0; c < 4; ++c) {
          const KeyCode key_code = key_codes[8 * j + lane_column + c % 2];
          p[j][c] = map.logit(p[j][c] * scale, queries[c / 2], key_code, shared.table);
          tile_max[c / 2] = larger(p[j][c], tile_max[c / 2]);
        }
      }
      Acc guard[2];
      VK_UNROLL
      for (int r = 0; r < 2; ++r) {
        const Acc of_row = warp_max<4>(tile_max[r]);
        const Acc new_max = of_row > row_max[r] ? of_row : row_max[r];
        guard[r] = new_max == NOTHING ? Acc(0) : new_max;  // -inf - -inf would be NaN
        const Acc correction = Exp::exp(row_max[r] - guard[r]);
        row_max[r] = new_max;
        row_sum[r] *= correction;
        VK_UNROLL
        for (int j = 0; j < COLUMNS / 8; ++j) {
          output[j][2 * r] *= correction;
          output[j][2 * r + 1] *= correction;
        }
      }
      VK_UNROLL
      for (int j = 0; j < KEY_BLOCKS; ++j) {
        if (8 * j + 8 <= seen.begin || 8 * j >= seen.end) {
          VK_UNROLL
          for (int c = 0; c < 4; ++c) p[j][c] = Acc(0);
          continue;
        }
        VK_UNROLL
        for (int c = 0; c < 4; ++c) {
          p[j][c] = Exp::exp(p[j][c] - guard[c / 2]);
          row_sum[c / 2] += p[j][c];
        }
      }

      cp_async_wait<0>();
      group.sync();
      T* const scratch = shared.scratch + group.first_row * (Engine::SCRATCH / ROWS);
      // A tile's part on its own, as matrix libraries do: one running sum over many tiles would err more.
      Acc part[COLUMNS / 8][4];
      clear(part);
      Engine::multiply_registers(part, p, scratch, shared.v, shared.ld_value, value_blocks, seen);
      VK_UNROLL
      for (int j = 0; j < COLUMNS / 8; ++j) {
        VK_UNROLL
        for (int c = 0; c < 4; ++c) output[j][c] += part[j][c];
      }
      group.sync();  // before the next tile, or the output, overwrites keys and values
    }

    forget(tile);
    // The values' tile is free: the output goes through it, to be written along whichever dimension is dense.
    Acc factor[2];
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      factor[r] = finish_row<T>(problem, map, batch, item.head, row_max[r], row_sum[r],
                                [&] { return query(lane_row + 8 * r); });
    }
    write_sums(shared.v + group.first_row * shared.ld_value, shared.ld_value, output, value_blocks, factor[0],
               factor[1]);
    group.sync();
    store_tile(matrix(problem.out, batch, problem.value_dim), shared.v, shared.ld_value, group, query);
    group.sync();  // before the next batch entry overwrites the tile
  }
}

template <class Engine, int COLUMNS, class Map>
void forward_with(Problem problem, const Map& map, Stream stream) {
  split(&problem, map.query_tiles(Engine::ROWS), Engine::ROWS);
  launch_items<Engine::ROWS>(forward_kernel<Engine, COLUMNS, Map>, problem,
                             ForwardLayout<Engine>(problem, map), map, stream);
}

// Values wider than the registers take several passes, each with its own columns.
template <class T, class Run>
void forward_passes(const Problem& problem, int columns, Run run) {
  for (int channel = 0; channel < problem.value_dim; channel += columns) {
    Problem pass = problem;
    pass.value_dim = problem.value_dim - channel < columns ? problem.value_dim - channel : columns;
    pass.v.data = static_cast<T*>(problem.v.data) + channel * problem.v.stride[3];
    pass.out.data = static_cast<T*>(problem.out.data) + channel * problem.out.stride[3];
    run(pass);
  }
}

// The rows of forward()'s tiles, a function of the sizes only. Tensor cores take 16 only where nothing is
// larger; double always does (one kernel less to build, and its large tiles would seldom fit).
template <class T, class Map>
int forward_rows(const Problem& problem, const Map& map) {
  if (std::is_same_v<T, double> || map.fits_small_tile()) return 16;
  if (!std::is_floating_point_v<T>) return 64;
  return ForwardLayout<Engine<T, 64>>(problem, map).bytes > SHARED_LIMIT ? 16 : 64;
}

// Fills out and lse.
template <class T, class Map>
void forward(const Problem& problem, const Map& map, Stream stream) {
  const int rows = forward_rows<T>(problem, map);
  if constexpr (std::is_floating_point_v<T>) {
    constexpr int COLUMNS = std::is_same_v<T, double> ? 64 : MAX_COLUMNS;  // what the registers hold
    forward_passes<T>(problem, COLUMNS, [&](const Problem& pass) {
      if constexpr (std::is_same_v<T, float>) {
        if (rows == 64) return forward_with<Engine<T, 64>, COLUMNS>(pass, map, stream);
      }
      forward_with<Engine<T, 16>, COLUMNS>(pass, map, stream);
    });
  } else {
    const int widest = problem.head_dim > problem.value_dim ? problem.head_dim : problem.value_dim;
    if (rows == 64 && widest <= 32) return stream_with<Engine<T, 64>, 32, 32>(problem, map, stream);
    if (rows == 64 && widest <= 64) return stream_with<Engine<T, 64>, 64, 64>(problem, map, stream);
    forward_passes<T>(problem, MAX_COLUMNS, [&](const Problem& pass) {
      rows == 64 ? stream_with<Engine<T, 64>, 0, MAX_COLUMNS>(pass, map, stream)
                 : stream_with<Engine<T, 16>, 0, MAX_COLUMNS>(pass, map, stream);
    });
  }
}

}  // namespace vitkernels::tile_attention
