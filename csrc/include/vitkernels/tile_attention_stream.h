// Forward of the tile-attention core on tensor cores: tiles of keys stream through a group that keeps its
// queries, as fragments, and its output in registers.
//
// Tiles of keys and values have two places. While one is multiplied the next is on its way, that of the next
// batch entry too, and a tile costs one barrier: it says that the tile has landed, and that all warps are
// done with the other place. What depends on a tile of keys alone, its tokens, codes and the keys that each
// warp sees, is found once an item where there is room to keep it.
//
// Floors are those of tile_attention_forward.h. A tile of 64 x 64 at 64 channels takes a warp 64 products of
// 16 x 8 x 16, some six cycles of its scheduler each, and 450 other instructions: arithmetic, issue and
// memory bind in nearly equal parts, so all three must overlap.
#pragma once
#include <cmath>

#include "vitkernels/tile_attention_layout.h"

namespace vitkernels::tile_attention {

// HEAD: the channels of q and k in shared memory, a power of two, where COLUMNS are those of v: what is known
// at compile time costs no addresses. 0: known at run time, up to COLUMNS of v.
template <class Engine, int HEAD, int COLUMNS>
struct StreamLayout {
  using T = typename Engine::T;
  static constexpr int ROWS = Engine::ROWS;
  // More would leave fewer than four blocks of an SM of sm_90, whose work hides more than a second place
  // does.
  static constexpr int64_t COMFORTABLE = 57 * 1024;
  static constexpr int KEPT = 8;  // tiles of keys whose codes are kept, at most

  int ld_head, ld_value, ld_query;  // the output leaves through the queries' place
  int head_bits, value_bits;        // see ChunkOrder
  int ahead;                        // whether a tile sets out before its turn
  int stages;                       // places of keys and values
  int query_stages;                 // and of queries
  int kept;  // tiles of keys whose codes are kept; 0: those of each place are found anew
  bool wide_q, wide_k, wide_v, wide_out, all_wide;
  typename Engine::Acc scale;  // times unit
  int q, k, v, key_codes, query_tokens, key_tokens, spans, table;
  int64_t bytes;

  template <class Map>
  StreamLayout(const Problem& problem, const Map& map) {
    ld_head = leading_dimension<T>(HEAD > 0 ? HEAD : problem.head_dim);
    ld_value = leading_dimension<T>(HEAD > 0 ? COLUMNS : problem.value_dim);
    ld_query = ld_head > ld_value ? ld_head : ld_value;
    head_bits = chunk_bits<T>(ld_head - leading_dimension<T>(0));
    value_bits = chunk_bits<T>(ld_value - leading_dimension<T>(0));
    const auto wide = [&](const View& view, int channels) { return moves_wide<T>(view, problem, channels); };
    wide_q = wide(problem.q, problem.head_dim);
    wide_k = wide(problem.k, problem.head_dim);
    wide_v = wide(problem.v, problem.value_dim);
    wide_out = wide(problem.out, problem.value_dim);
    all_wide = wide_q && wide_k && wide_v;
    scale = static_cast<typename Engine::Acc>(problem.scale * Exponential<T>::unit);
    const int most = most_key_tiles(map, ROWS, 0);
    kept = most <= KEPT ? most : 0;
    ahead = 1;
    stages = most > 1 || problem.batch_per_chunk > 1 ? 2 : 1;
    carve(problem, map);
    if (stages == 1 || bytes <= COMFORTABLE) return;
    ahead = 0;
    stages = 1;
    carve(problem, map);
  }

 private:
  template <class Map>
  void carve(const Problem& problem, const Map& map) {
    query_stages = stages == 2 && problem.batch_per_chunk > 1 ? 2 : 1;
    const int slots = (kept > 0 ? kept * (ENTERS<Map> ? query_stages : 1) : stages) * ROWS;
    Carver carver;
    key_codes = carver.take<typename Map::KeyCode>(slots);
    query_tokens = carver.take<int>(SCATTERED<Map> ? ROWS : 0);
    key_tokens = carver.take<int>(SCATTERED<Map> ? slots : 0);
    spans = carver.take<int>(RUNS<Map> ? 0 : kept * (ROWS / 16));
    q = carver.take<T>(query_stages * ROWS * ld_query);
    k = carver.take<T>(stages * ROWS * ld_head);
    v = carver.take<T>(stages * ROWS * ld_value);
    table = carver.take<typename Engine::Acc>(map.shared_elements());
    bytes = carver.used();
  }
};

// One over the sum of a row of weights, from its lanes' parts; the first of its lanes stores the row's lse.
template <class T, class Map, class Acc, class Token>
VK_DEVICE Acc finish_row(const Problem& problem, const Map& map, int batch, int head, Acc row_max,
                         Acc row_sum, Token token_of_row) {
  using Exp = Exponential<T>;
  const Acc total = warp_sum<4>(row_sum), factor = Acc(1) / total;  // NaN for -inf logits, as softmax gives
  const int token = token_of_row();
  if (lane_id() % 4 == 0 && token >= 0 && present(problem.lse)) {
    const typename PositionsOf<Map>::type position(problem.lse, map);
    offset<Acc>(problem.lse, batch, head)[position(token)] =
        (row_max + Exp::log(total)) * static_cast<Acc>(1.0 / Exp::unit);
  }
  return factor;
}

// Blocks of an SM that the registers must allow.
template <class Engine, int HEAD>
constexpr int STREAM_MIN_BLOCKS = HEAD == 0 ? 3 : 4;

// Computed here, and not again in every branch that needs it.
template <class Query>
VK_DEVICE void settle(Query& query) {
  if constexpr (!std::is_empty_v<Query>) {
    int words[sizeof(Query) / sizeof(int)];
    memcpy(words, &query, sizeof(query));
    for (int& word : words) forget(word);
    memcpy(&query, words, sizeof(query));
  }
}

template <class Visit, int... NUMBERS>
VK_DEVICE void each_of(std::integer_sequence<int, NUMBERS...>, const Visit& visit) {
  (visit(std::integral_constant<int, NUMBERS>()), ...);
}

template <class Engine, int HEAD, int COLUMNS, class Map>
VK_KERNEL void VK_LAUNCH_BOUNDS(BLOCK_THREADS, (STREAM_MIN_BLOCKS<Engine, HEAD>))
    forward_stream_kernel(Problem problem, StreamLayout<Engine, HEAD, COLUMNS> layout, Map map) {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  using Exp = Exponential<T>;
  using KeyCode = typename Map::KeyCode;
  constexpr int ROWS = Engine::ROWS, THREADS = Group<ROWS>::THREADS, WARPS = ROWS / 16;
  constexpr bool FIXED = HEAD > 0;
  constexpr int STEPS = FIXED ? HEAD / 16 : 1;  // of the products with keys
  constexpr Acc NOTHING = -INFINITY;

  const Group<ROWS> group;
  const int groups = Group<ROWS>::PER_BLOCK == 1 ? 1 : block_dim_x() / THREADS;
  const int64_t index = static_cast<int64_t>(block_x()) * groups + group.index;
  if (index >= problem.items()) return;
  const Item item = get_item(problem, index);
  const int key_tiles = map.key_tiles_of(ROWS, item.tile);
  if (key_tiles == 0) return;  // a tile without queries
  char* const base = shared_memory() + group.index * layout.bytes;
  const auto place = [&](int first, int number, int elements) {
    return reinterpret_cast<T*>(base + first) + number * elements;
  };
  KeyCode* const all_codes = reinterpret_cast<KeyCode*>(base + layout.key_codes);
  int* const query_tokens = reinterpret_cast<int*>(base + layout.query_tokens);
  int* const all_tokens = reinterpret_cast<int*>(base + layout.key_tokens);
  Acc* const table = reinterpret_cast<Acc*>(base + layout.table);

  const int ld_head = FIXED ? leading_dimension<T>(HEAD) : layout.ld_head;
  const int ld_value = FIXED ? leading_dimension<T>(COLUMNS) : layout.ld_value;
  const int ld_query = FIXED ? leading_dimension<T>(HEAD > COLUMNS ? HEAD : COLUMNS) : layout.ld_query;
  const int head_bits = FIXED ? chunk_bits<T>(HEAD) : layout.head_bits;
  const int value_bits = FIXED ? chunk_bits<T>(COLUMNS) : layout.value_bits;
  const int depth = FIXED ? HEAD : round_up(problem.head_dim, 16);
  const int value_depth = FIXED ? COLUMNS : round_up(problem.value_dim, 16);
  const int lane_row = group.first_row + lane_id() / 4, lane_column = lane_id() % 4 * 2;
  const bool keeps = layout.kept > 0;
  int tile = item.tile;  // forgotten from time to time, lest what follows from it fill the registers

  const auto query = [&](int slot) {
    return token_of<Map>(query_tokens, slot, [&](int slot) { return map.query(ROWS, tile, slot); });
  };
  // The codes of key tile i: where they are kept, or those of the place in turn.
  const auto slots_of = [&](int i, int turn, int queries) {
    if (!keeps) return turn * ROWS;
    return ((ENTERS<Map> ? queries * layout.kept : 0) + i) * ROWS;
  };
  const auto find_code = [&](const Map& there, int i, int slots, int e) {
    const int token = token_of<Map>(all_tokens + slots, e,
                                    [&](int e) { return there.key_of(ROWS, tile, i + e / ROWS, e % ROWS); });
    all_codes[slots + e] = token < 0 ? there.no_key() : there.key_code(token);
  };
  const auto find_codes = [&](const Map& there, int slots) {
    int first = group.thread;
    forget(first);
    VK_NO_UNROLL
    for (int e = first; e < key_tiles * ROWS; e += THREADS) find_code(there, 0, slots, e);
  };
  const auto find_tokens = [&](int i, int tiles, int slots) {
    for (int e = group.thread; e < tiles * ROWS; e += THREADS)
      all_tokens[slots + e] = map.key_of(ROWS, tile, i + e / ROWS, e % ROWS);
  };

  // Sets out for key tile i of a batch entry, and for its queries where it is the first.
  const auto fetch = [&](int batch, int i, int turn, int queries) {
    forget(tile);
    Map there = map;
    enter(there, batch, item.head, 0);
    const auto copy = [&](T* to, int ld, int bits, int padded, const View& view, int channels,
                          const auto& tokens) {
      copy_tile(to, ld, Matrix<T, Map>(view, map, batch, item.head, channels), group, bits, padded, tokens);
    };
    const auto with_tokens = [&](bool keys, const int* kept_tokens, const auto& use) {
      if constexpr (RUNS<Map>)
        use(keys ? map.key_run(ROWS, tile, i) : map.query_run(ROWS, tile));
      else
        use([&](int slot) { return kept_tokens[slot]; });
    };
    T* const to_q = place(layout.q, queries, ROWS * ld_query);
    T* const to_k = place(layout.k, turn, ROWS * ld_head);
    T* const to_v = place(layout.v, turn, ROWS * ld_value);
    if (i == 0 && layout.wide_q) {
      with_tokens(false, query_tokens, [&](const auto& tokens) {
        copy(to_q, ld_query, head_bits, depth, problem.q, problem.head_dim, tokens);
      });
    }
    const int slots = slots_of(i, turn, queries);
    if constexpr (SCATTERED<Map>) {
      if (!keeps) {
        find_tokens(i, 1, slots);
        group.sync();
      }
    }
    with_tokens(true, all_tokens + slots, [&](const auto& tokens) {
      if (layout.wide_k) copy(to_k, ld_head, head_bits, depth, problem.k, problem.head_dim, tokens);
      if (layout.wide_v) copy(to_v, ld_value, value_bits, value_depth, problem.v, problem.value_dim, tokens);
    });
    // The rest by one piece of code, which is long: a block that runs through it once waits for its lines.
    VK_NO_UNROLL
    for (int n = layout.all_wide ? 3 : i == 0 ? 0 : 1; n < 3; ++n) {
      if (n == 0 ? layout.wide_q : n == 1 ? layout.wide_k : layout.wide_v) continue;
      const View& view = n == 0 ? problem.q : n == 1 ? problem.k : problem.v;
      const Matrix<T, Map> source(view, map, batch, item.head, n < 2 ? problem.head_dim : problem.value_dim);
      with_tokens(n > 0, n > 0 ? all_tokens + slots : query_tokens, [&](const auto& tokens) {
        const auto token = [&](int slot) {
          if constexpr (RUNS<Map>)
            return tokens.token(slot);
          else
            return tokens(slot);
        };
        T* const to = n == 0 ? to_q : n == 1 ? to_k : to_v;
        const int ld = n == 0 ? ld_query : n == 1 ? ld_head : ld_value, padded = n < 2 ? depth : value_depth;
        if (source.tokens_dense())
          load_columns(to, ld, source, group, token, padded);
        else
          load_tile(to, ld, source, group, token, padded);
      });
    }
    cp_async_commit();
    if (!keeps) {
      if (group.thread < ROWS) find_code(there, i, slots, group.thread);
    } else if (ENTERS<Map> && i == 0) {
      find_codes(there, slots);
    }
  };

  if constexpr (SCATTERED<Map>) {
    for (int slot = group.thread; slot < ROWS; slot += THREADS)
      query_tokens[slot] = map.query(ROWS, tile, slot);
    if (keeps) find_tokens(0, key_tiles, 0);
  }

  int query_codes[2] = {0, 0};
  Acc output[COLUMNS / 8][4];
  Acc row_max[2], row_sum[2];  // row_sum: of this lane's columns
  // The tiles of all batch entries in one sequence, which begins before the first.
  const int ahead = layout.ahead, other = layout.stages - 1, more_queries = layout.query_stages - 1;
  int batch = item.batch_begin, i = -1, turn = other;
  VK_NO_UNROLL
  while (batch < item.batch_end) {
    cp_async_wait<0>();
    group.sync();  // the tile has landed, or the tokens are there; and all are done with the other place
    {
      const bool wraps = i + ahead == key_tiles;
      const int next_batch = wraps ? batch + 1 : batch;
      if (i + ahead >= 0 && next_batch < item.batch_end)
        fetch(next_batch, wraps ? 0 : i + ahead, turn ^ other, next_batch & more_queries);
    }
    if (i < 0) {  // behind the first copies
      int head = item.head, first = group.thread;
      forget(head);
      forget(first);
      map.stage(table, head, first, THREADS);
      if (keeps && !ENTERS<Map>) find_codes(map, 0);
      if constexpr (!RUNS<Map>) {
        int* const spans = reinterpret_cast<int*>(base + layout.spans);
        for (int e = group.thread; e < layout.kept * WARPS && e < key_tiles * WARPS; e += THREADS) {
          const Span span = Strips<Map>::keys_seen(map, ROWS, tile, e / WARPS, e % WARPS * 16);
          spans[e] = span.begin | span.end << 16;
        }
      }
      VK_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int token = query(lane_row + 8 * r);
        query_codes[r] = map.query_code(token < 0 ? 0 : token);
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
    const int queries = batch & more_queries;
    T* const own = place(layout.q, queries, ROWS * ld_query) + group.first_row * ld_query;
    if (i == 0) {
      enter(map, batch, item.head, 0);
      clear(output);
      VK_UNROLL
      for (int r = 0; r < 2; ++r) {
        row_max[r] = NOTHING;
        row_sum[r] = Acc(0);
      }
    }

    Span seen{0, ROWS};  // of the keys, by this warp
    if constexpr (RUNS<Map>) {
      seen.end = group.first_row < map.query_run(ROWS, tile).count ? map.key_run(ROWS, tile, i).count : 0;
    } else if constexpr (ROWS > 16) {
      if (keeps) {
        const int span = reinterpret_cast<const int*>(base + layout.spans)[i * WARPS + group.first_row / 16];
        seen = {span & 0xffff, span >> 16};
      } else {
        forget(tile);
        seen = Strips<Map>::keys_seen(map, ROWS, tile, i, group.first_row);
      }
    }
    const KeyCode* const key_codes = all_codes + slots_of(i, here, queries);
    const T* const keys = place(layout.k, here, ROWS * ld_head);
    const T* const values = place(layout.v, here, ROWS * ld_value);

    // Sixteen keys at a time. Without a test for each where all are seen: latencies then hide each other.
    const auto attend = [&](auto all) {
      constexpr bool ALL = decltype(all)::value;
      const Span wanted = ALL ? Span{0, ROWS} : seen;
      const auto each_strip = [&](auto visit) {
        const auto test = [&](auto strip) {
          constexpr int FIRST = 16 * decltype(strip)::value;
          if (FIRST + 16 > wanted.begin && FIRST < wanted.end) visit(strip);
        };
        each_of(std::make_integer_sequence<int, ROWS / 16>(), test);
      };
      Acc p[ROWS / 8][4];
      clear(p);
      uint32_t fragments[STEPS][4];
      if constexpr (FIXED) {
        VK_UNROLL
        for (int s = 0; s < STEPS; ++s) Engine::load_rows(fragments[s], own + 16 * s, ld_query);
      }
      if constexpr (!FIXED)
        Engine::multiply_rows(p, own, ld_query, keys, ld_head, depth, wanted);
      else if constexpr (ALL)
        Engine::template multiply_kept<0, ROWS / 8>(p, fragments, keys, ld_head);

      typename Map::Query of_queries[2] = {map.of_query(query_codes[0]), map.of_query(query_codes[1])};
      if constexpr (COLUMNS <= 32) {  // there are registers for them
        settle(of_queries[0]);
        settle(of_queries[1]);
      }
      Acc tile_max[2] = {NOTHING, NOTHING};
      each_strip([&](auto strip) {
        constexpr int FIRST = 2 * decltype(strip)::value;
        if constexpr (FIXED && !ALL) Engine::template multiply_kept<FIRST, 2>(p, fragments, keys, ld_head);
        VK_UNROLL
        for (int j = FIRST; j < FIRST + 2; ++j) {
          const auto codes = Vec<KeyCode, 2>::load(key_codes + 8 * j + lane_column);
          VK_UNROLL
          for (int c = 0; c < 4; ++c) {
            p[j][c] = map.logit(p[j][c] * layout.scale, of_queries[c / 2], codes[c % 2], table);
            tile_max[c / 2] = larger(p[j][c], tile_max[c / 2]);
          }
        }
      });
      Acc guard[2], correction[2];
      VK_UNROLL
      for (int r = 0; r < 2; ++r) {
        Acc new_max = larger(tile_max[r], row_max[r]);
        VK_UNROLL
        for (int mask = 2; mask > 0; mask /= 2) new_max = larger(shfl_xor(new_max, mask), new_max);
        guard[r] = new_max == NOTHING ? Acc(0) : new_max;  // -inf - -inf would be NaN
        correction[r] = Exp::exp(row_max[r] - guard[r]);
        row_max[r] = new_max;
        row_sum[r] *= correction[r];
      }
      if (i > 0) {
        VK_UNROLL
        for (int j = 0; j < COLUMNS / 8; ++j) {
          VK_UNROLL
          for (int c = 0; c < 4; ++c) output[j][c] *= correction[c / 2];
        }
      }
      each_strip([&](auto strip) {
        constexpr int FIRST = 2 * decltype(strip)::value;
        VK_UNROLL
        for (int j = FIRST; j < FIRST + 2; ++j) {
          VK_UNROLL
          for (int c = 0; c < 4; ++c) {
            p[j][c] = Exp::exp(p[j][c] - guard[c / 2]);
            row_sum[c / 2] += p[j][c];
          }
        }
        Engine::multiply_registers(output, p[FIRST], p[FIRST + 1], values + 8 * FIRST * ld_value, ld_value,
                                   value_depth / 8);
      });
    };
    if constexpr (RUNS<Map> || ROWS == 16) {
      if (seen.end == ROWS || (ROWS == 16 && seen.end > 0))
        attend(std::true_type());
      else if (ROWS > 16 && seen.end > 0)
        attend(std::false_type());
    } else {
      if (seen.begin < seen.end) attend(std::false_type());
    }

    if (++i < key_tiles) continue;
    i = 0;
    forget(tile);
    Acc factor[2];
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      factor[r] = finish_row<T>(problem, map, batch, item.head, row_max[r], row_sum[r],
                                [&] { return query(lane_row + 8 * r); });
    }
    // Only this warp reads its queries, and has: the output goes through their place, to be written along
    // whichever dimension is dense.
    sync_warp();
    const auto target = [&] { return Matrix<T, Map>(problem.out, map, batch, item.head, problem.value_dim); };
    write_rows(own, ld_query, value_bits, output, value_depth / 8, factor[0], factor[1], layout.wide_out,
               target, [&](int slot) { return query(group.first_row + slot); });
    ++batch;
  }
}

// Enough items to fill a large device several times over where an item costs little to begin; see split().
template <class Map>
int64_t stream_items(const Map& map, int rows) {
  return SCATTERED<Map> || map.shared_elements() > 0 || rows == 16 ? 0 : 8192;
}

template <class Engine, int HEAD, int COLUMNS, class Map>
void stream_with(Problem problem, const Map& map, Stream stream) {
  split(&problem, map.query_tiles(Engine::ROWS), Engine::ROWS, stream_items(map, Engine::ROWS));
  launch_items<Engine::ROWS>(forward_stream_kernel<Engine, HEAD, COLUMNS, Map>, problem,
                             StreamLayout<Engine, HEAD, COLUMNS>(problem, map), map, stream);
}

}  // namespace vitkernels::tile_attention
