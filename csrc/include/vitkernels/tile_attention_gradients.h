// Backward of the tile-attention core on tensor cores, for queries and keys that meet in several tiles: tiles
// of the other side stream through a group that keeps its own rows as fragments.
//
// Seen from the queries or from the keys a tile is the same work. With own rows a1, a2 and others b1, b2,
// which are (q, grad_out) and (k, v), or (k, v) and (q, grad_out):
//   P = exp(logits(a1 b1^T) - lse), D = P * (a2 b2^T - (delta - grad_lse)), grad_a1 = scale D b1
// and of the keys also grad_a2 = P b2. The layout of sums is that of a left operand, so P and D never leave
// the registers, and no warp waits for another's. What a query has of its own, lse and delta - grad_lse, is
// found once for both sides (query_rows_kernel).
//
// Tiles have two places and cost one barrier, as in tile_attention_stream.h; a gradient of the operator's
// own, summed over tiles in shared memory, costs another. 96 products a warp and tile of the queries' side
// and 128 of the keys' at 64 channels, 20 % more than a kernel of both sides would need, whose sums would
// have no owner.
#pragma once
#include "vitkernels/tile_attention_query_rows.h"
#include "vitkernels/tile_attention_stream.h"

namespace vitkernels::tile_attention {

enum class Owner { queries, keys, values, both };

template <Owner OWNER>
constexpr bool KEY_SIDE = OWNER == Owner::keys || OWNER == Owner::values;

// D of one tile in shared memory as an operator's gradient() sees it.
template <class Acc, class KeyCode>
struct GradientTile {
  const Acc* values;  // [rows][ld], zero where a slot has no token
  int ld;
  int rows;
  const int* query_codes;
  const KeyCode* key_codes;  // no_key() where a slot has none
  int query_tile;            // the tiles' numbers as in query() and key_of()
  int key_tile;
  int thread;  // of `threads`
  int threads;
};

// A code that vectors can hold.
constexpr size_t padded_size(size_t size) {
  size_t padded = 1;
  while (padded < size) padded *= 2;
  return padded;
}
template <class Code>
struct alignas(padded_size(sizeof(Code))) Padded {
  Code code;
};

template <class Engine, Owner OWNER, int WIDTH, class Map>
struct GradientsLayout {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  static constexpr int ROWS = Engine::ROWS;
  static constexpr bool KEYS = OWNER == Owner::keys;
  static constexpr int LD = WIDTH + 8, LD_GRADIENT = ROWS + 8;
  static constexpr int64_t COMFORTABLE = 74 * 1024;  // three blocks of an SM of sm_90
  static constexpr int KEPT = 8;                     // tiles of others whose codes are kept, at most
  // What a logit needs of the other side; nothing, where it needs nothing of a query.
  using Code = std::conditional_t<KEYS, Padded<typename Map::Query>, Padded<typename Map::KeyCode>>;
  static constexpr bool CODES = !KEYS || !std::is_empty_v<typename Map::Query>;

  int ahead, stages, own_stages, kept;  // as in StreamLayout
  bool wide[4], wide_out[2];            // of a1, a2, b1, b2
  Acc scale;                            // times unit
  int a, b, rows, codes, own_codes, own_tokens, tokens, spans, gradient, table, sums;
  int64_t bytes;

  GradientsLayout(const Problem& problem, const Map& map, bool with_sums) {
    const auto moves = [&](const View& view, int channels) { return moves_wide<T>(view, problem, channels); };
    const bool of_queries[2] = {moves(problem.q, problem.head_dim),
                                moves(problem.grad_out, problem.value_dim)};
    const bool of_keys[2] = {moves(problem.k, problem.head_dim), moves(problem.v, problem.value_dim)};
    for (int i = 0; i < 2; ++i) {
      wide[i] = KEYS ? of_keys[i] : of_queries[i];
      wide[2 + i] = KEYS ? of_queries[i] : of_keys[i];
    }
    wide_out[0] = moves(KEYS ? problem.grad_k : problem.grad_q, problem.head_dim);
    wide_out[1] = moves(problem.grad_v, problem.value_dim);
    scale = static_cast<Acc>(problem.scale * Exponential<T>::unit);
    const int most = KEYS ? most_query_tiles(map, ROWS, 0) : most_key_tiles(map, ROWS, 0);
    kept = most <= KEPT ? most : 0;
    ahead = 1;
    stages = most > 1 || problem.batch_per_chunk > 1 ? 2 : 1;
    carve(problem, map, with_sums);
    if (stages == 1 || bytes <= COMFORTABLE) return;
    ahead = 0;
    stages = 1;
    carve(problem, map, with_sums);
  }

 private:
  void carve(const Problem& problem, const Map& map, bool with_sums) {
    own_stages = stages == 2 && problem.batch_per_chunk > 1 ? 2 : 1;
    const int slots = (kept > 0 ? kept * (ENTERS<Map> ? own_stages : 1) : stages) * ROWS;
    Carver carver;
    a = carver.take<T>(own_stages * 2 * ROWS * LD);
    b = carver.take<T>(stages * 2 * ROWS * LD);
    rows = carver.take<QueryRow>((KEYS ? stages : own_stages) * ROWS);
    codes = carver.take<Code>(CODES ? slots : 0);
    own_codes =
        KEYS ? carver.take<typename Map::KeyCode>(own_stages * ROWS) : carver.take<int>(with_sums ? ROWS : 0);
    own_tokens = carver.take<int>(SCATTERED<Map> ? ROWS : 0);
    tokens = carver.take<int>(SCATTERED<Map> ? slots : 0);
    spans = carver.take<int>(RUNS<Map> ? 0 : kept * (ROWS / 16));
    gradient = carver.take<Acc>(with_sums ? ROWS * LD_GRADIENT : 0);
    table = carver.take<Acc>(map.shared_elements());
    sums = carver.take<Acc>(with_sums ? map.gradient_elements() : 0);
    bytes = carver.used();
  }
};

// Blocks of an SM that the registers must allow.
template <Owner OWNER, int WIDTH>
constexpr int GRADIENTS_MIN_BLOCKS = WIDTH > 32 ? 3 : 4;

template <class Engine, Owner OWNER, int WIDTH, class Map>
VK_KERNEL void VK_LAUNCH_BOUNDS(BLOCK_THREADS, (GRADIENTS_MIN_BLOCKS<OWNER, WIDTH>))
    gradients_kernel(Problem problem, GradientsLayout<Engine, OWNER, WIDTH, Map> layout, Map map) {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  using Exp = Exponential<T>;
  using KeyCode = typename Map::KeyCode;
  using Layout = GradientsLayout<Engine, OWNER, WIDTH, Map>;
  using Code = typename Layout::Code;
  constexpr int ROWS = Engine::ROWS, THREADS = Group<ROWS>::THREADS, WARPS = ROWS / 16;
  constexpr int LD = Layout::LD, LD_GRADIENT = Layout::LD_GRADIENT, TILE = ROWS * LD, STEPS = WIDTH / 16;
  constexpr int BITS = chunk_bits<T>(WIDTH);
  constexpr bool KEYS = Layout::KEYS;
  // Others at a time. Of those that are seen all but the last are whole where tokens follow each other;
  // there, and where registers allow, more chains of products hide each other's latency.
  constexpr int STRIP = RUNS<Map> && (!KEYS || WIDTH <= 32) ? 32 : 16;

  const Group<ROWS> group;
  if (block_x() >= problem.items()) return;
  const Item item = get_item(problem, block_x());
  const int meetings = KEYS ? map.query_tiles_of(ROWS, item.tile) : map.key_tiles_of(ROWS, item.tile);
  const bool want_sums = !KEYS && problem.gradient_partials != nullptr;
  const auto place = [&](auto zero, int first, int elements) {
    return reinterpret_cast<decltype(zero)*>(shared_memory() + first) + elements;
  };
  Code* const all_codes = reinterpret_cast<Code*>(shared_memory() + layout.codes);
  int* const own_tokens = place(0, layout.own_tokens, 0);
  int* const all_tokens = place(0, layout.tokens, 0);
  Acc* const table = place(Acc(), layout.table, 0);
  Acc* const sums = place(Acc(), layout.sums, 0);

  const int lane_row = group.first_row + lane_id() / 4, lane_column = lane_id() % 4 * 2;
  const bool keeps = layout.kept > 0;
  int tile = item.tile;  // forgotten from time to time, lest what follows from it fill the registers

  const auto own_token = [&](int slot) {
    return token_of<Map>(own_tokens, slot, [&](int slot) {
      return KEYS ? map.key(ROWS, tile, slot) : map.query(ROWS, tile, slot);
    });
  };
  const auto other_token = [&](int i, int slot) {
    return KEYS ? map.query_of(ROWS, tile, i, slot) : map.key_of(ROWS, tile, i, slot);
  };
  const auto slots_of = [&](int i, int turn, int own) {
    if (!keeps) return turn * ROWS;
    return ((ENTERS<Map> ? own * layout.kept : 0) + i) * ROWS;
  };
  const auto find_tokens = [&](int i, int tiles, int slots) {
    int first = group.thread;
    forget(first);
    for (int e = first; e < tiles * ROWS; e += THREADS)
      all_tokens[slots + e] = other_token(i + e / ROWS, e % ROWS);
  };
  const auto find_codes = [&](const Map& there, int i, int tiles, int slots) {
    if constexpr (Layout::CODES) {
      int first = group.thread;
      forget(first);
      for (int e = first; e < tiles * ROWS; e += THREADS) {
        const int token =
            token_of<Map>(all_tokens + slots, e, [&](int e) { return other_token(i + e / ROWS, e % ROWS); });
        if constexpr (KEYS)
          all_codes[slots + e].code = there.of_query(there.query_code(token < 0 ? 0 : token));
        else
          all_codes[slots + e].code = token < 0 ? there.no_key() : there.key_code(token);
      }
    }
  };

  // Sets out for tile i of the others in a batch entry, and for the own rows where it is the first.
  const auto fetch = [&](int batch, int i, int turn, int own) {
    forget(tile);
    Map there = map;
    enter(there, batch, item.head, 0);
    const auto copy = [&](T* to, const View& view, int channels, bool wide, const auto& tokens,
                          const auto& find) {
      fetch_tile(to, LD, Matrix<T, Map>(view, map, batch, item.head, channels), group, wide, BITS, WIDTH,
                 tokens, find);
    };
    const auto copies = [&](bool queries, bool others, T* to, const int* kept_tokens) {
      const View &first = queries ? problem.q : problem.k, &second = queries ? problem.grad_out : problem.v;
      const int side = others ? 2 : 0;
      const auto both = [&](const auto& tokens, const auto& find) {
        copy(to, first, problem.head_dim, layout.wide[side], tokens, find);
        copy(to + TILE, second, problem.value_dim, layout.wide[side + 1], tokens, find);
        if (!queries || group.thread >= ROWS) return;
        const int slot = group.thread, token = find(slot);
        float* const row = place(0.0f, layout.rows, 2 * ((KEYS ? turn : own) * ROWS + slot));
        const int64_t unit = static_cast<int64_t>(batch) * problem.heads + item.head;
        if (token < 0)
          QueryRow{{INFINITY, 0.0f}}.store(row);  // P = 0
        else
          cp_async8(row, static_cast<const float*>(problem.query_rows) +
                             2 * (unit * map.query_count() + query_number(map, token, 0)));
      };
      if constexpr (RUNS<Map>) {
        const int number = others ? i : tile;
        const Run run = queries ? map.query_run(ROWS, number) : map.key_run(ROWS, 0, number);
        both(run, [&](int slot) { return run.token(slot); });
      } else {
        const auto find = [&](int slot) { return kept_tokens[slot]; };
        both(find, find);
      }
    };
    if (i == 0) {
      copies(!KEYS, false, place(T(), layout.a, own * 2 * TILE), own_tokens);
      if (KEYS && group.thread < ROWS) {
        const int token = own_token(group.thread);
        reinterpret_cast<KeyCode*>(shared_memory() + layout.own_codes)[own * ROWS + group.thread] =
            token < 0 ? there.no_key() : there.key_code(token);
      }
    }
    const int slots = slots_of(i, turn, own);
    if constexpr (SCATTERED<Map>) {
      if (!keeps) {
        find_tokens(i, 1, slots);
        group.sync();
      }
    }
    copies(KEYS, true, place(T(), layout.b, turn * 2 * TILE), all_tokens + slots);
    cp_async_commit();
    if (!keeps)
      find_codes(there, i, 1, slots);
    else if (ENTERS<Map> && i == 0)
      find_codes(there, 0, meetings, slots);
  };

  if constexpr (SCATTERED<Map>) {
    for (int slot = group.thread; slot < ROWS; slot += THREADS)
      own_tokens[slot] = KEYS ? map.key(ROWS, tile, slot) : map.query(ROWS, tile, slot);
    if (keeps) find_tokens(0, meetings, 0);
  }
  if (want_sums) {  // element e belongs to thread e % THREADS throughout, so these need no barrier
    for (int e = group.thread; e < map.gradient_elements(); e += THREADS) sums[e] = Acc(0);
  }

  int query_codes[2] = {0, 0};  // of the own rows
  KeyCode key_codes[2];
  QueryRow query_rows[2];
  uint32_t left1[STEPS][4], left2[STEPS][4];
  Acc first_sums[WIDTH / 8][4], second_sums[KEYS ? WIDTH / 8 : 1][4];
  // The tiles of all batch entries in one sequence, which begins before the first.
  const int ahead = layout.ahead, other = layout.stages - 1, more_own = layout.own_stages - 1;
  int batch = meetings > 0 ? item.batch_begin : item.batch_end, i = -1, turn = other;
  VK_NO_UNROLL
  while (batch < item.batch_end) {
    cp_async_wait<0>();
    group.sync();  // the tile has landed, or the tokens are there; and all are done with the other place
    {
      const bool wraps = i + ahead == meetings;
      const int next_batch = wraps ? batch + 1 : batch;
      if (i + ahead >= 0 && next_batch < item.batch_end)
        fetch(next_batch, wraps ? 0 : i + ahead, turn ^ other, next_batch & more_own);
    }
    if (i < 0) {  // behind the first copies
      map.stage(table, item.head, group.thread, THREADS);
      if (keeps && !ENTERS<Map>) find_codes(map, 0, meetings, 0);
      if constexpr (!RUNS<Map>) {
        int* const spans = place(0, layout.spans, 0);
        for (int e = group.thread; e < layout.kept * WARPS && e < meetings * WARPS; e += THREADS) {
          const int row = e % WARPS * 16;
          const Span span = KEYS ? Strips<Map>::seen_by(map, ROWS, tile, e / WARPS, row)
                                 : Strips<Map>::keys_seen(map, ROWS, tile, e / WARPS, row);
          spans[e] = span.begin | span.end << 16;
        }
      }
      if constexpr (!KEYS) {
        VK_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int token = own_token(lane_row + 8 * r);
          query_codes[r] = map.query_code(token < 0 ? 0 : token);
          if (want_sums && lane_column == 0) place(0, layout.own_codes, 0)[lane_row + 8 * r] = query_codes[r];
        }
      }
    }
    const int here = turn;
    turn ^= other;
    if (i < 0) {
      i = 0;
      continue;
    }
    if (ahead == 0) {
      cp_async_wait<0>();
      group.sync();
    }
    forget(query_codes[0]);
    forget(query_codes[1]);
    const int own = batch & more_own;
    T* const own1 = place(T(), layout.a, own * 2 * TILE) + group.first_row * LD;
    T* const own2 = own1 + TILE;
    if (i == 0) {
      enter(map, batch, item.head, 0);
      clear(first_sums);
      clear(second_sums);
      VK_UNROLL
      for (int s = 0; s < STEPS; ++s) {
        Engine::load_rows(left1[s], own1 + 16 * s, LD);
        Engine::load_rows(left2[s], own2 + 16 * s, LD);
      }
      VK_UNROLL
      for (int r = 0; r < 2; ++r) {
        if constexpr (KEYS)
          key_codes[r] = reinterpret_cast<const KeyCode*>(shared_memory() +
                                                          layout.own_codes)[own * ROWS + lane_row + 8 * r];
        else
          query_rows[r] = QueryRow::load(place(0.0f, layout.rows, 2 * (own * ROWS + lane_row + 8 * r)));
      }
    }

    Span seen{0, ROWS};  // of the others, by this warp
    if constexpr (RUNS<Map>) {
      const int queries = map.query_run(ROWS, KEYS ? i : tile).count;
      const int keys = map.key_run(ROWS, 0, KEYS ? tile : i).count;
      seen.end = group.first_row < (KEYS ? keys : queries) ? (KEYS ? queries : keys) : 0;
    } else if (keeps) {
      const int span = place(0, layout.spans, 0)[i * WARPS + group.first_row / 16];
      seen = {span & 0xffff, span >> 16};
    } else {
      forget(tile);
      seen = KEYS ? Strips<Map>::seen_by(map, ROWS, tile, i, group.first_row)
                  : Strips<Map>::keys_seen(map, ROWS, tile, i, group.first_row);
    }
    const Code* const codes = all_codes + slots_of(i, here, own);
    const T* const others1 = place(T(), layout.b, here * 2 * TILE);
    const T* const others2 = others1 + TILE;
    const float* const other_rows = place(0.0f, layout.rows, KEYS ? 2 * here * ROWS : 0);
    Acc* const gradient = place(Acc(), layout.gradient, lane_row * LD_GRADIENT + lane_column);
    typename Map::Query of_queries[2];
    if constexpr (!KEYS) {
      VK_UNROLL
      for (int r = 0; r < 2; ++r) of_queries[r] = map.of_query(query_codes[r]);
    }

    VK_NO_UNROLL
    for (int first = 0; first < ROWS; first += STRIP) {
      Acc p[STRIP / 8][4], d[STRIP / 8][4];
      clear(d);
      if (first + STRIP > seen.begin && first < seen.end) {
        clear(p);
        Engine::template multiply_kept<0, STRIP / 8>(p, left1, others1 + first * LD, LD);
        Engine::template multiply_kept<0, STRIP / 8>(d, left2, others2 + first * LD, LD);
        VK_UNROLL
        for (int j = 0; j < STRIP / 8; ++j) {
          VK_UNROLL
          for (int column = 0; column < 2; ++column) {
            const int slot = first + 8 * j + lane_column + column;
            Code code{};
            if constexpr (Layout::CODES) code = codes[slot];
            QueryRow row;
            if constexpr (KEYS) row = QueryRow::load(other_rows + 2 * slot);
            VK_UNROLL
            for (int r = 0; r < 2; ++r) {
              Acc& pair = p[j][2 * r + column];
              Acc& slope = d[j][2 * r + column];
              const Acc score = pair * layout.scale;
              if constexpr (KEYS) {
                pair = Exp::exp(map.logit(score, code.code, key_codes[r], table) - row[0]);
                slope = pair * (slope - row[1]);
              } else {
                pair = Exp::exp(map.logit(score, of_queries[r], code.code, table) - query_rows[r][0]);
                slope = pair * (slope - query_rows[r][1]);
              }
            }
          }
        }
        VK_UNROLL
        for (int j = 0; j < STRIP / 8; j += 2) {
          if constexpr (KEYS)
            Engine::multiply_registers(second_sums, p[j], p[j + 1], others2 + (first + 8 * j) * LD, LD,
                                       WIDTH / 8);
          Engine::multiply_registers(first_sums, d[j], d[j + 1], others1 + (first + 8 * j) * LD, LD,
                                     WIDTH / 8);
        }
      }
      if (want_sums) {
        VK_UNROLL
        for (int j = 0; j < STRIP / 8; ++j) {
          Vec<Acc, 2>{{d[j][0], d[j][1]}}.store(gradient + first + 8 * j);
          Vec<Acc, 2>{{d[j][2], d[j][3]}}.store(gradient + 8 * LD_GRADIENT + first + 8 * j);
        }
      }
    }
    if constexpr (!KEYS) {
      if (want_sums) {
        group.sync();
        forget(tile);
        // The barrier of the next tile comes before its gradients.
        map.gradient(sums, GradientTile<Acc, KeyCode>{place(Acc(), layout.gradient, 0), LD_GRADIENT, ROWS,
                                                      place(0, layout.own_codes, 0), &codes->code, tile, i,
                                                      group.thread, THREADS});
      }
    }

    if (++i < meetings) continue;
    i = 0;
    forget(tile);
    // Only this warp reads its own rows, and has: the gradients go out through their place.
    const Acc scale = static_cast<Acc>(problem.scale);
    const auto own_slot = [&](int slot) { return own_token(group.first_row + slot); };
    const auto write = [&](const View& view, int channels, T* rows, const auto& of, Acc factor, bool wide) {
      if (!present(view)) return;
      write_sums(rows, LD, of, WIDTH / 8, factor, factor);  // write_rows() here: a spill in strip attention
      sync_warp();
      const Matrix<T, Map> target(view, map, batch, item.head, channels);
      if (wide)
        store_rows(target, rows, LD, BITS, own_slot);
      else
        store_tile(target, rows, LD, Group<16>(), own_slot);
    };
    sync_warp();
    write(KEYS ? problem.grad_k : problem.grad_q, problem.head_dim, own1, first_sums, scale,
          layout.wide_out[0]);
    if constexpr (KEYS)
      write(problem.grad_v, problem.value_dim, own2, second_sums, Acc(1), layout.wide_out[1]);
    ++batch;
  }

  if (want_sums) store_partials(problem, item, sums, map.gradient_elements(), group.thread, THREADS);
}

template <class Engine, Owner OWNER, int WIDTH, class Map>
void gradients_with(Problem problem, const Map& map, Stream stream) {
  constexpr int ROWS = Engine::ROWS;
  split(&problem, KEY_SIDE<OWNER> ? map.key_tiles(ROWS) : map.query_tiles(ROWS), ROWS,
        stream_items(map, ROWS));
  if (KEY_SIDE<OWNER>) problem.gradient_partials = nullptr;
  const GradientsLayout<Engine, OWNER, WIDTH, Map> layout(problem, map, problem.gradient_partials != nullptr);
  launch_items<ROWS>(gradients_kernel<Engine, OWNER, WIDTH, Map>, problem, layout, map, stream);
}

template <class Engine, int WIDTH, class Map>
void stream_gradients(const Problem& problem, const Map& map, Stream stream) {
  const bool of_queries = present(problem.grad_q) || problem.gradient_partials != nullptr;
  const bool of_keys = present(problem.grad_k) || present(problem.grad_v);
  if (!of_queries && !of_keys) return;
  find_query_rows<WIDTH, typename Engine::T>(problem, map, stream);
  if (of_queries) gradients_with<Engine, Owner::queries, WIDTH>(problem, map, stream);
  if (of_keys) gradients_with<Engine, Owner::keys, WIDTH>(problem, map, stream);
}

}  // namespace vitkernels::tile_attention
