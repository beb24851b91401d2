// Backward of the tile-attention core. Deterministic: every sum has one owner and a fixed order.
//
// Floor per batch entry and head: reads of q, k, v, grad_out (and out, beyond one tile) and writes of grad_q,
// grad_k, grad_v, once each; 2 N M (3 d + 2 dv) FLOPs; N M exponentials (P is recomputed from lse). Small
// windows are bound by the bytes.
//
// Here for float and double, for half precision with more than 64 channels and for its tiles of 16 rows; the
// rest is in tile_attention_gradients.h and tile_attention_together.h. One kernel in four roles. With P =
// exp(logits - lse), G = grad_out v^T, delta = sum(grad_out * out) and D = P * (G - delta + grad_lse), the
// gradient of the logits,
//   Owner::queries  a query tile against its key tiles: grad_q = scale D k, the operator's sums over D
//   Owner::keys     a key tile against its query tiles: grad_k = scale D^T q
//   Owner::values   the same: grad_v = P^T grad_out; the registers do not hold the sums of both
//   Owner::both     a query tile and the key tile that it alone meets (disjoint()): everything, every tensor
//                   read once.
// In the last, whole rows of P are at hand, so delta = sum(P * G): out is not read, and its
// rounding not inherited.
#pragma once
#include <cmath>

#include "vitkernels/tile_attention_gradients.h"
#include "vitkernels/tile_attention_together.h"

namespace vitkernels::tile_attention {

// Blocks of an SM that the registers must allow: latency is hidden by other blocks. A map of little geometry
// may say `static constexpr bool FEW_REGISTERS = true`: its kernels fit three where others would spill.
template <class Map, class = void>
constexpr bool FEW_REGISTERS = false;
template <class Map>
constexpr bool FEW_REGISTERS<Map, std::void_t<decltype(Map::FEW_REGISTERS)>> = Map::FEW_REGISTERS;

template <class Engine, Owner OWNER, class Map>
constexpr int BACKWARD_MIN_BLOCKS = std::is_floating_point_v<typename Engine::T> ? 2
                                    : OWNER == Owner::both && Engine::ROWS == 16 ? 4
                                    : OWNER == Owner::both || FEW_REGISTERS<Map> ? 3
                                                                                 : 2;

template <class Engine, Owner OWNER, class Map>
VK_KERNEL void VK_LAUNCH_BOUNDS(BLOCK_THREADS, (BACKWARD_MIN_BLOCKS<Engine, OWNER, Map>))
    backward_kernel(Problem problem, BackwardLayout<Engine> layout, Map map) {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  using Exp = Exponential<T>;
  using KeyCode = typename Map::KeyCode;
  using Layout = BackwardLayout<Engine>;
  constexpr int ROWS = Engine::ROWS, KEY_BLOCKS = ROWS / 8, THREADS = Group<ROWS>::THREADS;
  constexpr bool WITH_D = OWNER != Owner::values, WITH_OUT = WITH_D && OWNER != Owner::both;
  constexpr int LD_PAIR = Layout::LD_PAIR, LD_GRADIENT = Layout::LD_GRADIENT;

  const Group<ROWS> group;
  const int groups = block_dim_x() / THREADS;
  const int64_t index = static_cast<int64_t>(block_x()) * groups + group.index;
  if (index >= problem.items()) return;
  const Item item = get_item(problem, index);
  const BackwardShared<Engine> shared(layout, shared_memory() + group.index * layout.bytes);
  KeyCode* const key_codes = static_cast<KeyCode*>(shared.key_codes);

  const int row0 = group.first_row, lane_row = row0 + lane_id() / 4, lane_column = lane_id() % 4 * 2;
  const int head_depth = round_up(problem.head_dim, 16), value_depth = round_up(problem.value_dim, 16);
  const int ld_head = layout.ld_head, ld_value = layout.ld_value;
  const int first_column = problem.first_column, column_blocks = round_up(problem.columns, 16) / 8;
  const Acc scale = static_cast<Acc>(problem.scale),
            logit_scale = static_cast<Acc>(problem.scale * Exp::unit);
  const bool want_sums = !KEY_SIDE<OWNER> && problem.gradient_partials != nullptr;
  int meetings = 1;
  if constexpr (OWNER == Owner::queries) meetings = map.key_tiles_of(ROWS, item.tile);
  if constexpr (KEY_SIDE<OWNER>) meetings = map.query_tiles_of(ROWS, item.tile);
  int tile = item.tile;  // forgotten from time to time, lest the map's geometry fill the registers
  const auto query = [&](int i, int slot) {
    return KEY_SIDE<OWNER> ? map.query_of(ROWS, tile, i, slot) : map.query(ROWS, tile, slot);
  };
  const auto key = [&](int i, int slot) {
    return KEY_SIDE<OWNER> ? map.key(ROWS, tile, slot) : map.key_of(ROWS, tile, i, slot);
  };

  const auto query_of = [&](int i, int slot) {
    return token_of<Map>(shared.query_tokens, slot, [&](int slot) { return query(i, slot); });
  };
  const auto key_of = [&](int i, int slot) {
    return token_of<Map>(shared.key_tokens, slot, [&](int slot) { return key(i, slot); });
  };

  map.stage(shared.table, item.head, group.thread, THREADS);
  if constexpr (SCATTERED<Map>) {  // those of the own side; the others change from meeting to meeting
    for (int slot = group.thread; slot < ROWS; slot += THREADS) {
      if constexpr (KEY_SIDE<OWNER>)
        shared.key_tokens[slot] = key(0, slot);
      else
        shared.query_tokens[slot] = query(0, slot);
    }
  }
  if (want_sums) {  // element e belongs to thread e % THREADS throughout, so these need no barrier
    for (int e = group.thread; e < map.gradient_elements(); e += THREADS) shared.sums[e] = Acc(0);
  }

  for (int batch = item.batch_begin; batch < item.batch_end; ++batch) {
    enter(map, batch, item.head, 0);
    const auto matrix = [&](const View& view, int channels) {
      return Matrix<T, Map>(view, map, batch, item.head, channels);
    };
    const auto of_token = [&](const View& view, int token) {
      return offset<Acc>(view, batch, item.head)[typename PositionsOf<Map>::type(view, map)(token)];
    };
    // What survives from tile to tile; Owner::both has one tile and keeps nothing.
    constexpr int KEPT = OWNER == Owner::both ? 1 : MAX_COLUMNS / 8;
    Acc first[KEPT][4];  // grad_q, grad_k or grad_v
    clear(first);

    for (int i = 0; i < meetings; ++i) {
      forget(tile);
      if constexpr (SCATTERED<Map>) {
        for (int slot = group.thread; slot < ROWS; slot += THREADS) {
          if constexpr (KEY_SIDE<OWNER>)
            shared.query_tokens[slot] = query(i, slot);
          else
            shared.key_tokens[slot] = key(i, slot);
        }
        group.sync();
      }
      const auto query_token = [&](int slot) { return query_of(i, slot); };
      const auto key_token = [&](int slot) { return key_of(i, slot); };
      Span seen{0, ROWS}, seen_by{0, ROWS};  // the keys of this warp's queries, the queries of its keys
      if constexpr (ROWS > 16 && OWNER == Owner::queries)
        seen = Strips<Map>::keys_seen(map, ROWS, tile, i, row0);
      if constexpr (ROWS > 16 && KEY_SIDE<OWNER>) {
        seen = Strips<Map>::keys_seen_of(map, ROWS, tile, i, row0);
        seen_by = Strips<Map>::seen_by(map, ROWS, tile, i, row0);
      }
      const bool new_queries = KEY_SIDE<OWNER> || i == 0, new_keys = !KEY_SIDE<OWNER> || i == 0;
      if (new_queries) {
        load_tile(shared.q, ld_head, matrix(problem.q, problem.head_dim), group, query_token);
        load_tile(shared.grad_out, ld_value, matrix(problem.grad_out, problem.value_dim), group, query_token);
        if (WITH_OUT && present(problem.grad_out))
          load_tile(shared.out, ld_value, matrix(problem.out, problem.value_dim), group, query_token);
      }
      if (new_keys) {
        load_tile(shared.k, ld_head, matrix(problem.k, problem.head_dim), group, key_token);
        if (WITH_D) load_tile(shared.v, ld_value, matrix(problem.v, problem.value_dim), group, key_token);
      }
      cp_async_commit();
      for (int slot = group.thread; slot < ROWS; slot += THREADS) {
        if (new_queries) {
          const int token = query_token(slot);
          shared.query_codes[slot] = map.query_code(token < 0 ? 0 : token);
        }
        if (new_keys) {
          const int token = key_token(slot);
          key_codes[slot] = token < 0 ? map.no_key() : map.key_code(token);
        }
      }
      cp_async_wait<0>();
      group.sync();

      if (new_queries) {
        const int row = group.thread / 2, half = group.thread % 2;
        const int token = query_token(row);
        Acc delta = Acc(0);
        if (WITH_OUT && present(problem.grad_out)) {
          // In float and double in the order of G's products: where one key takes all, out is v and delta
          // cancels G to the last bit, as it does in a softmax's own backward.
          constexpr int WIDTH = 16 / sizeof(T);
          constexpr bool CHAIN = std::is_floating_point_v<T>;
          const int first = CHAIN ? 0 : half * WIDTH, end = CHAIN && half == 1 ? 0 : value_depth;
          for (int c = first; c < end; c += CHAIN ? WIDTH : 2 * WIDTH) {
            const auto a = Vec<T, WIDTH>::load(shared.grad_out + row * ld_value + c);
            const auto b = Vec<T, WIDTH>::load(shared.out + row * ld_value + c);
            Acc part = IN_PARTS<T> ? Acc(0) : delta;
            VK_UNROLL
            for (int e = 0; e < WIDTH; ++e) part += to_accumulate(a[e]) * to_accumulate(b[e]);
            delta = IN_PARTS<T> ? delta + part : part;
          }
        }
        delta = warp_sum<2>(delta);
        Acc lse = INFINITY, grad_lse = Acc(0);  // without a query: P = 0
        if (token >= 0) {
          lse = of_token(problem.lse, token) * static_cast<Acc>(Exp::unit);
          if (present(problem.grad_lse)) grad_lse = of_token(problem.grad_lse, token);
        }
        if (half == 0) {
          shared.delta[row] = delta;
          shared.grad_lse[row] = grad_lse;
          shared.lse[row] = lse;
        }
        group.sync();
      }

      Acc p[KEY_BLOCKS][4];
      clear(p);
      Engine::multiply_rows(p, shared.q + row0 * ld_head, ld_head, shared.k, ld_head, head_depth, seen);
      const typename Map::Query queries[2] = {map.of_query(shared.query_codes[lane_row]),
                                              map.of_query(shared.query_codes[lane_row + 8])};
      const Acc lse[2] = {shared.lse[lane_row], shared.lse[lane_row + 8]};
      Acc delta[2] = {shared.delta[lane_row], shared.delta[lane_row + 8]};
      const Acc grad_lse[2] = {shared.grad_lse[lane_row], shared.grad_lse[lane_row + 8]};
      VK_UNROLL
      for (int j = 0; j < KEY_BLOCKS; ++j) {
        if (8 * j + 8 <= seen.begin || 8 * j >= seen.end) {
          VK_UNROLL
          for (int c = 0; c < 4; ++c) p[j][c] = Acc(0);
          continue;
        }
        VK_UNROLL
        for (int c = 0; c < 4; ++c) {
          const KeyCode key_code = key_codes[8 * j + lane_column + c % 2];
          const int r = c / 2;
          p[j][c] = Exp::exp(map.logit(p[j][c] * logit_scale, queries[r], key_code, shared.table) - lse[r]);
        }
      }
      if constexpr (OWNER == Owner::both && std::is_floating_point_v<T>) {
        // The rounding of lse, which is that of numbers as large as the logits, is a common factor of a
        // query's weights; they all are here, and sum to one. Half precision's own rounding drowns it.
        VK_UNROLL
        for (int r = 0; r < 2; ++r) {
          Acc sum = Acc(0);
          VK_UNROLL
          for (int j = 0; j < KEY_BLOCKS; ++j) sum += p[j][2 * r] + p[j][2 * r + 1];
          sum = warp_sum<4>(sum);
          const Acc factor = sum == Acc(0) ? Acc(1) : Acc(1) / sum;  // of a slot without a query
          VK_UNROLL
          for (int j = 0; j < KEY_BLOCKS; ++j) {
            p[j][2 * r] *= factor;
            p[j][2 * r + 1] *= factor;
          }
        }
      }
      Acc d[KEY_BLOCKS][4];
      clear(d);
      if (WITH_D && present(problem.grad_out))
        Engine::multiply_rows(d, shared.grad_out + row0 * ld_value, ld_value, shared.v, ld_value, value_depth,
                              seen);
      if constexpr (OWNER == Owner::both) {
        VK_UNROLL
        for (int r = 0; r < 2; ++r) {
          Acc sum = Acc(0);
          VK_UNROLL
          for (int j = 0; j < KEY_BLOCKS; ++j)
            sum += p[j][2 * r] * d[j][2 * r] + p[j][2 * r + 1] * d[j][2 * r + 1];
          delta[r] = warp_sum<4>(sum);
        }
      }
      VK_UNROLL
      for (int j = 0; j < KEY_BLOCKS; ++j) {
        VK_UNROLL
        for (int c = 0; c < 4; ++c) d[j][c] = p[j][c] * (d[j][c] - delta[c / 2] + grad_lse[c / 2]);
      }

      if (want_sums) {
        VK_UNROLL
        for (int j = 0; j < KEY_BLOCKS; ++j) {
          Acc* row = shared.gradient + lane_row * LD_GRADIENT + 8 * j + lane_column;
          Vec<Acc, 2>{{d[j][0], d[j][1]}}.store(row);
          Vec<Acc, 2>{{d[j][2], d[j][3]}}.store(row + 8 * LD_GRADIENT);
        }
        group.sync();
        forget(tile);
        map.gradient(shared.sums,
                     GradientTile<Acc, KeyCode>{shared.gradient, LD_GRADIENT, ROWS, shared.query_codes,
                                                key_codes, tile, i, group.thread, THREADS});
        group.sync();  // before p and d take over the memory
      }
      if (OWNER != Owner::queries)
        write_sums(shared.p + row0 * LD_PAIR, LD_PAIR, p, KEY_BLOCKS, Acc(1), Acc(1));
      if (WITH_D) write_sums(shared.d + row0 * LD_PAIR, LD_PAIR, d, KEY_BLOCKS, Acc(1), Acc(1));
      group.sync();  // also: every warp is done with v

      if constexpr (OWNER == Owner::queries) {
        Engine::template multiply<false>(first, shared.d + row0 * LD_PAIR, LD_PAIR, shared.k + first_column,
                                         ld_head, column_blocks, seen);
      } else if constexpr (OWNER == Owner::keys) {
        Engine::template multiply<true>(first, shared.d + row0, LD_PAIR, shared.q + first_column, ld_head,
                                        column_blocks, seen_by);
      } else if constexpr (OWNER == Owner::values) {
        Engine::template multiply<true>(first, shared.p + row0, LD_PAIR, shared.grad_out + first_column,
                                        ld_value, column_blocks, seen_by);
      } else {
        // Each result replaces, some channels at a time, an operand that has been read for the last time:
        // grad_v takes the place of v, grad_q and grad_k those of the same channels of q and k.
        if (present(problem.grad_v)) {
          for (int c = 0; c < value_depth; c += 64) {
            const int blocks = value_depth - c < 64 ? (value_depth - c) / 8 : 8;
            Acc grad_v[8][4];
            clear(grad_v);
            Engine::template multiply<true>(grad_v, shared.p + row0, LD_PAIR, shared.grad_out + c, ld_value,
                                            blocks, seen_by);
            write_sums(shared.v + row0 * ld_value + c, ld_value, grad_v, blocks, Acc(1), Acc(1));
          }
        }
        for (int c = 0; c < head_depth; c += 32) {
          const int blocks = head_depth - c < 32 ? (head_depth - c) / 8 : 4;
          Acc grad_q[4][4], grad_k[4][4];
          clear(grad_q);
          clear(grad_k);
          if (present(problem.grad_q))
            Engine::template multiply<false>(grad_q, shared.d + row0 * LD_PAIR, LD_PAIR, shared.k + c,
                                             ld_head, blocks, seen);
          if (present(problem.grad_k))
            Engine::template multiply<true>(grad_k, shared.d + row0, LD_PAIR, shared.q + c, ld_head, blocks,
                                            seen_by);
          group.sync();
          write_sums(shared.q + row0 * ld_head + c, ld_head, grad_q, blocks, scale, scale);
          write_sums(shared.k + row0 * ld_head + c, ld_head, grad_k, blocks, scale, scale);
        }
      }
      group.sync();  // before the next tile, or a result, overwrites an operand
    }

    if constexpr (OWNER == Owner::queries) {
      write_sums(shared.q + row0 * ld_head, ld_head, first, column_blocks, scale, scale);
    } else if constexpr (OWNER == Owner::keys) {
      write_sums(shared.k + row0 * ld_head, ld_head, first, column_blocks, scale, scale);
    } else if constexpr (OWNER == Owner::values) {
      write_sums(shared.v + row0 * ld_value, ld_value, first, column_blocks, Acc(1), Acc(1));
    }
    group.sync();
    forget(tile);
    const auto query_token = [&](int slot) { return query_of(0, slot); };
    const auto key_token = [&](int slot) { return key_of(0, slot); };
    if (!KEY_SIDE<OWNER> && present(problem.grad_q))
      store_tile(matrix(problem.grad_q, problem.columns), shared.q, ld_head, group, query_token);
    if ((OWNER == Owner::keys || OWNER == Owner::both) && present(problem.grad_k))
      store_tile(matrix(problem.grad_k, problem.columns), shared.k, ld_head, group, key_token);
    if ((OWNER == Owner::values || OWNER == Owner::both) && present(problem.grad_v))
      store_tile(matrix(problem.grad_v, OWNER == Owner::values ? problem.columns : problem.value_dim),
                 shared.v, ld_value, group, key_token);
    group.sync();  // before the next batch entry overwrites the tiles
  }

  if (want_sums) store_partials(problem, item, shared.sums, map.gradient_elements(), group.thread, THREADS);
}

template <class Engine, Owner OWNER, class Map>
void backward_with(Problem problem, const Map& map, Stream stream) {
  constexpr int ROWS = Engine::ROWS;
  split(&problem, KEY_SIDE<OWNER> ? map.key_tiles(ROWS) : map.query_tiles(ROWS), ROWS);
  if (KEY_SIDE<OWNER>) problem.gradient_partials = nullptr;
  const BackwardLayout<Engine> layout(problem, map, problem.gradient_partials != nullptr);
  launch_items<ROWS>(backward_kernel<Engine, OWNER, Map>, problem, layout, map, stream);
}

// A gradient wider than the registers takes several passes, each with its own columns. The operator's sums
// are left by the first.
template <class Engine, Owner OWNER, class Map>
void backward_passes(const Problem& problem, View Problem::* gradient, int width, const Map& map,
                     Stream stream) {
  const bool wanted = present(problem.*gradient);
  for (int column = 0; column < (wanted ? width : 1); column += MAX_COLUMNS) {
    Problem pass = problem;
    pass.first_column = column;
    pass.columns = width - column < MAX_COLUMNS ? width - column : MAX_COLUMNS;
    View& target = pass.*gradient;
    if (wanted) target.data = static_cast<typename Engine::T*>(target.data) + column * target.stride[3];
    if (column > 0) pass.gradient_partials = nullptr;
    backward_with<Engine, OWNER>(pass, map, stream);
  }
}

template <class Engine, class Map>
void backward_apart(const Problem& problem, const Map& map, Stream stream) {
  if (present(problem.grad_q) || problem.gradient_partials != nullptr)
    backward_passes<Engine, Owner::queries>(problem, &Problem::grad_q, problem.head_dim, map, stream);
  if (present(problem.grad_k))
    backward_passes<Engine, Owner::keys>(problem, &Problem::grad_k, problem.head_dim, map, stream);
  if (present(problem.grad_v))
    backward_passes<Engine, Owner::values>(problem, &Problem::grad_v, problem.value_dim, map, stream);
}

template <class Engine, class Map>
void backward_together(Problem problem, const Map& map, Stream stream) {
  problem.columns = problem.head_dim;
  backward_with<Engine, Owner::both>(problem, map, stream);
}

// The rows of backward()'s tiles, a function of the sizes only; see forward_rows().
template <class T, class Map>
int backward_rows(const Problem& problem, const Map& map) {
  if (std::is_same_v<T, double> || map.fits_small_tile()) return 16;
  if (!std::is_floating_point_v<T>)  // four tiles of 64 rows have no room for more
    return problem.head_dim > MAX_COLUMNS || problem.value_dim > MAX_COLUMNS ? 16 : 64;
  // with_sums always: the choice must not depend on which gradients are wanted
  return BackwardLayout<Engine<T, 64>>(problem, map, true).bytes > SHARED_LIMIT ? 16 : 64;
}

// The channels, 32 or 64, of the kernels that are made for them (tile_attention_gradients.h,
// tile_attention_together.h) where these run; or 0.
template <class T, class Map>
int streamed_width(const Problem& problem, const Map& map) {
  const int widest = problem.head_dim > problem.value_dim ? problem.head_dim : problem.value_dim;
  if (std::is_floating_point_v<T> || widest > 64 || backward_rows<T>(problem, map) != 64) return 0;
  return widest <= 32 ? 32 : 64;
}

// Bytes of Problem::query_rows.
template <class T, class Map>
int64_t query_rows_workspace(const Problem& problem, const Map& map) {
  if (streamed_width<T>(problem, map) == 0 || disjoint(map, 64, 0)) return 0;
  return static_cast<int64_t>(problem.batch) * problem.heads * map.query_count() *
         static_cast<int64_t>(sizeof(QueryRow));
}

// Sums of the operator's gradient() that backward() leaves in gradient_partials: [partials, heads, elements].
template <class T, class Map>
int64_t backward_partials(Problem problem, const Map& map) {
  const int rows = backward_rows<T>(problem, map);
  const bool streams = streamed_width<T>(problem, map) > 0;
  split(&problem, map.query_tiles(rows), rows, streams ? stream_items(map, rows) : 0);
  return problem.chunks * problem.tiles;
}

// Fills those of grad_q, grad_k, grad_v and gradient_partials that are present.
template <class T, class Map>
void backward(const Problem& problem, const Map& map, Stream stream) {
  constexpr bool PLAIN = std::is_floating_point_v<T>;
  const int rows = backward_rows<T>(problem, map);
  const bool together = disjoint(map, rows, 0);
  if constexpr (!std::is_same_v<T, double>) {
    if (rows == 64) {
      if constexpr (!PLAIN) {
        const auto made_for = [&](auto width) {
          constexpr int WIDTH = decltype(width)::value;
          together ? together_with<Engine<T, 64>, WIDTH>(problem, map, stream)
                   : stream_gradients<Engine<T, 64>, WIDTH>(problem, map, stream);
        };
        const int width = streamed_width<T>(problem, map);
        if (width == 32) return made_for(std::integral_constant<int, 32>());
        if (width == 64) return made_for(std::integral_constant<int, 64>());
      }
      if (together) return backward_together<Engine<T, 64>>(problem, map, stream);
      return backward_apart<Engine<T, 64>>(problem, map, stream);
    }
  }
  if (!together) return backward_apart<Engine<T, 16>>(problem, map, stream);
  backward_together<Engine<T, 16>>(problem, map, stream);
}

}  // namespace vitkernels::tile_attention
