// Backward of the tile-attention core on tensor cores, for query and key tiles that meet each other and no
// other (disjoint()): one kernel makes all gradients and reads every tensor once.
//
// A warp makes P and D of 16 queries, and grad_q from the D in its registers. The other warps see P and D, as
// left operands of grad_v = P^T grad_out and grad_k = scale D^T q, through shared memory. Whole rows of P are
// at hand, so delta = sum(P * G): out is not read, and its rounding not inherited. Three barriers a tile.
//
// Bound by the bytes: at 49 tokens and 32 channels in 16 bits 22 KB a tile, or 700 cycles of an SM's share of
// 4.25 TB/s, for 80 products and some 400 other instructions a warp. Latency is hidden by other blocks.
#pragma once
#include "vitkernels/tile_attention_gradients.h"

namespace vitkernels::tile_attention {

template <class Engine, int WIDTH, class Map>
struct TogetherLayout {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  static constexpr int ROWS = Engine::ROWS;
  static constexpr int LD = WIDTH + 8, LD_PAIR = ROWS + 8, LD_GRADIENT = ROWS + 8;

  bool wide[4], wide_out[3];  // of q, k, v, grad_out and of grad_q, grad_k, grad_v
  Acc scale;                  // times unit
  int tiles;                  // q, k, v, grad_out
  int pairs;                  // P, D; or the GradientTile
  int query_codes, key_codes, query_tokens, key_tokens, table, sums;
  int64_t bytes;

  TogetherLayout(const Problem& problem, const Map& map, bool with_sums) {
    const auto moves = [&](const View& view, int channels) { return moves_wide<T>(view, problem, channels); };
    wide[0] = moves(problem.q, problem.head_dim);
    wide[1] = moves(problem.k, problem.head_dim);
    wide[2] = moves(problem.v, problem.value_dim);
    wide[3] = moves(problem.grad_out, problem.value_dim);
    wide_out[0] = moves(problem.grad_q, problem.head_dim);
    wide_out[1] = moves(problem.grad_k, problem.head_dim);
    wide_out[2] = moves(problem.grad_v, problem.value_dim);
    scale = static_cast<Acc>(problem.scale * Exponential<T>::unit);
    static_assert(2 * sizeof(T) == sizeof(Acc), "P and D take the room of one tile of sums");
    Carver carver;
    tiles = carver.take<T>(4 * ROWS * LD);
    pairs = carver.take<T>(2 * ROWS * LD_PAIR);
    query_codes = carver.take<int>(with_sums ? ROWS : 0);
    key_codes = carver.take<typename Map::KeyCode>(ROWS);
    query_tokens = carver.take<int>(SCATTERED<Map> ? ROWS : 0);
    key_tokens = carver.take<int>(SCATTERED<Map> ? ROWS : 0);
    table = carver.take<Acc>(map.shared_elements());
    sums = carver.take<Acc>(with_sums ? map.gradient_elements() : 0);
    bytes = carver.used();
  }
};

template <class Engine, int WIDTH, class Map>
VK_KERNEL void VK_LAUNCH_BOUNDS(BLOCK_THREADS, (WIDTH > 32 ? 3 : 4))
    together_kernel(Problem problem, TogetherLayout<Engine, WIDTH, Map> layout, Map map) {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  using Exp = Exponential<T>;
  using KeyCode = typename Map::KeyCode;
  using Layout = TogetherLayout<Engine, WIDTH, Map>;
  constexpr int ROWS = Engine::ROWS, THREADS = Group<ROWS>::THREADS, KEY_BLOCKS = ROWS / 8;
  constexpr int LD = Layout::LD, LD_PAIR = Layout::LD_PAIR, TILE = ROWS * LD, STEPS = WIDTH / 16;
  constexpr int LD_GRADIENT = Layout::LD_GRADIENT, BITS = chunk_bits<T>(WIDTH);

  const Group<ROWS> group;
  if (block_x() >= problem.items()) return;
  const Item item = get_item(problem, block_x());
  const bool want_sums = problem.gradient_partials != nullptr;
  const auto place = [&](auto zero, int first) {
    return reinterpret_cast<decltype(zero)*>(shared_memory() + first);
  };
  T* const q = place(T(), layout.tiles);
  T *const k = q + TILE, *const v = q + 2 * TILE, *const grad_out = q + 3 * TILE;
  T* const pairs = place(T(), layout.pairs);
  KeyCode* const key_codes = reinterpret_cast<KeyCode*>(shared_memory() + layout.key_codes);
  int *const query_tokens = place(0, layout.query_tokens), *const key_tokens = place(0, layout.key_tokens);
  Acc *const table = place(Acc(), layout.table), *const sums = place(Acc(), layout.sums);

  const int lane_row = group.first_row + lane_id() / 4, lane_column = lane_id() % 4 * 2;
  int tile = item.tile;  // forgotten from time to time, lest what follows from it fill the registers
  const auto query = [&](int slot) {
    return token_of<Map>(query_tokens, slot, [&](int slot) { return map.query(ROWS, tile, slot); });
  };
  const auto key = [&](int slot) {
    return token_of<Map>(key_tokens, slot, [&](int slot) { return map.key_of(ROWS, tile, 0, slot); });
  };

  if constexpr (SCATTERED<Map>) {
    for (int slot = group.thread; slot < ROWS; slot += THREADS) {
      query_tokens[slot] = map.query(ROWS, tile, slot);
      key_tokens[slot] = map.key_of(ROWS, tile, 0, slot);
    }
    group.sync();
  }
  int query_codes[2];
  VK_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int token = query(lane_row + 8 * r);
    query_codes[r] = map.query_code(token < 0 ? 0 : token);
    if (want_sums && lane_column == 0) place(0, layout.query_codes)[lane_row + 8 * r] = query_codes[r];
  }
  if (want_sums) {  // element e belongs to thread e % THREADS throughout, so these need no barrier
    for (int e = group.thread; e < map.gradient_elements(); e += THREADS) sums[e] = Acc(0);
  }

  VK_NO_UNROLL
  for (int batch = item.batch_begin; batch < item.batch_end; ++batch) {
    enter(map, batch, item.head, 0);
    forget(tile);
    const auto load = [&](T* to, const View& view, int channels, bool wide, const auto& tokens,
                          const auto& find) {
      fetch_tile(to, LD, Matrix<T, Map>(view, map, batch, item.head, channels), group, wide, BITS, WIDTH,
                 tokens, find);
    };
    const auto load_all = [&](const auto& queries, const auto& keys) {
      load(q, problem.q, problem.head_dim, layout.wide[0], queries, query);
      load(k, problem.k, problem.head_dim, layout.wide[1], keys, key);
      load(v, problem.v, problem.value_dim, layout.wide[2], keys, key);
      load(grad_out, problem.grad_out, problem.value_dim, layout.wide[3], queries, query);
    };
    Span of_queries{0, ROWS}, of_keys{0, ROWS};
    if constexpr (RUNS<Map>) {
      const Run query_run = map.query_run(ROWS, tile), key_run = map.key_run(ROWS, tile, 0);
      load_all(query_run, key_run);
      of_queries.end = query_run.count;
      of_keys.end = key_run.count;
    } else {
      load_all(query, key);
    }
    cp_async_commit();
    // While the copies are on their way.
    Acc lse[2], shift[2];
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int token = query(lane_row + 8 * r);
      const auto of_token = [&](const View& view) {
        return offset<Acc>(view, batch, item.head)[typename PositionsOf<Map>::type(view, map)(token)];
      };
      lse[r] = token < 0 ? Acc(INFINITY) : of_token(problem.lse) * static_cast<Acc>(Exp::unit);  // P = 0
      shift[r] = token >= 0 && present(problem.grad_lse) ? of_token(problem.grad_lse) : Acc(0);
    }
    if (batch == item.batch_begin) map.stage(table, item.head, group.thread, THREADS);
    if (batch == item.batch_begin || ENTERS<Map>) {
      for (int slot = group.thread; slot < ROWS; slot += THREADS) {
        const int token = key(slot);
        key_codes[slot] = token < 0 ? map.no_key() : map.key_code(token);
      }
    }
    cp_async_wait<0>();
    group.sync();

    forget(query_codes[0]);
    forget(query_codes[1]);
    Acc p[KEY_BLOCKS][4], d[KEY_BLOCKS][4];
    clear(p);
    clear(d);
    uint32_t left[STEPS][4];
    VK_UNROLL
    for (int s = 0; s < STEPS; ++s) Engine::load_rows(left[s], q + group.first_row * LD + 16 * s, LD);
    Engine::template multiply_kept<0, KEY_BLOCKS>(p, left, k, LD);
    const typename Map::Query queries[2] = {map.of_query(query_codes[0]), map.of_query(query_codes[1])};
    VK_UNROLL
    for (int j = 0; j < KEY_BLOCKS; ++j) {
      const auto codes = Vec<KeyCode, 2>::load(key_codes + 8 * j + lane_column);
      VK_UNROLL
      for (int c = 0; c < 4; ++c)
        p[j][c] =
            Exp::exp(map.logit(p[j][c] * layout.scale, queries[c / 2], codes[c % 2], table) - lse[c / 2]);
    }
    VK_UNROLL
    for (int s = 0; s < STEPS; ++s) Engine::load_rows(left[s], grad_out + group.first_row * LD + 16 * s, LD);
    Engine::template multiply_kept<0, KEY_BLOCKS>(d, left, v, LD);
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      Acc delta = Acc(0);
      VK_UNROLL
      for (int j = 0; j < KEY_BLOCKS; ++j)
        delta += p[j][2 * r] * d[j][2 * r] + p[j][2 * r + 1] * d[j][2 * r + 1];
      shift[r] -= warp_sum<4>(delta);
    }
    VK_UNROLL
    for (int j = 0; j < KEY_BLOCKS; ++j) {
      VK_UNROLL
      for (int c = 0; c < 4; ++c) d[j][c] = p[j][c] * (d[j][c] + shift[c / 2]);
    }
    if (want_sums) {
      Acc* const gradient = place(Acc(), layout.pairs);
      VK_UNROLL
      for (int j = 0; j < KEY_BLOCKS; ++j) {
        Acc* const row = gradient + lane_row * LD_GRADIENT + 8 * j + lane_column;
        Vec<Acc, 2>{{d[j][0], d[j][1]}}.store(row);
        Vec<Acc, 2>{{d[j][2], d[j][3]}}.store(row + 8 * LD_GRADIENT);
      }
      group.sync();
      forget(tile);
      map.gradient(sums, GradientTile<Acc, KeyCode>{gradient, LD_GRADIENT, ROWS, place(0, layout.query_codes),
                                                    key_codes, tile, 0, group.thread, THREADS});
      group.sync();  // before P and D take over the memory
    }
    write_sums(pairs + group.first_row * LD_PAIR, LD_PAIR, p, KEY_BLOCKS, Acc(1), Acc(1));
    write_sums(pairs + (ROWS + group.first_row) * LD_PAIR, LD_PAIR, d, KEY_BLOCKS, Acc(1), Acc(1));
    Acc grad_q[WIDTH / 8][4], grad_k[WIDTH / 8][4], grad_v[WIDTH / 8][4];
    clear(grad_q);
    clear(grad_k);
    clear(grad_v);
    if (present(problem.grad_q)) Engine::multiply_registers(grad_q, d, nullptr, k, LD, WIDTH / 8, of_keys);
    group.sync();
    // Rows of keys without a token are not stored, nor made where all of a warp's are.
    if (group.first_row < of_keys.end) {
      if (present(problem.grad_v))
        Engine::template multiply<true>(grad_v, pairs + group.first_row, LD_PAIR, grad_out, LD, WIDTH / 8,
                                        of_queries);
      if (present(problem.grad_k))
        Engine::template multiply<true>(grad_k, pairs + ROWS * LD_PAIR + group.first_row, LD_PAIR, q, LD,
                                        WIDTH / 8, of_queries);
    }
    group.sync();  // all operands have been read: the gradients go out through their places
    forget(tile);
    const auto write = [&](const View& view, int channels, T* tile_of, const auto& of, Acc factor, bool wide,
                           const auto& token) {
      if (!present(view)) return;
      T* const rows = tile_of + group.first_row * LD;
      const auto target = [&] { return Matrix<T, Map>(view, map, batch, item.head, channels); };
      write_rows(rows, LD, BITS, of, WIDTH / 8, factor, factor, wide, target,
                 [&](int slot) { return token(group.first_row + slot); });
    };
    const Acc scale = static_cast<Acc>(problem.scale);
    write(problem.grad_q, problem.head_dim, q, grad_q, scale, layout.wide_out[0], query);
    write(problem.grad_k, problem.head_dim, k, grad_k, scale, layout.wide_out[1], key);
    write(problem.grad_v, problem.value_dim, v, grad_v, Acc(1), layout.wide_out[2], key);
    group.sync();  // before the next batch entry overwrites the tiles
  }

  if (want_sums) store_partials(problem, item, sums, map.gradient_elements(), group.thread, THREADS);
}

template <class Engine, int WIDTH, class Map>
void together_with(Problem problem, const Map& map, Stream stream) {
  constexpr int ROWS = Engine::ROWS;
  split(&problem, map.query_tiles(ROWS), ROWS, stream_items(map, ROWS));
  const TogetherLayout<Engine, WIDTH, Map> layout(problem, map, problem.gradient_partials != nullptr);
  launch_items<ROWS>(together_kernel<Engine, WIDTH, Map>, problem, layout, map, stream);
}

}  // namespace vitkernels::tile_attention
