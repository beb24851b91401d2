// The forward kernel: softmax(logits) v for tiles of queries, against all tokens with two masks (whole), or
// against those of a line with one (a sweep of the criss-cross mode).
#pragma once
#include "aligned.h"

namespace vitkernels::polyline_path_attention {

// Views have strides (batch, head, x, channel, y).
struct ForwardCall {
  Field field;
  int head_dim, value_dim;
  double scale;
  View q, k, v;
  View other_v;  // lines: further values, may be absent
  // whole: the mean of the two products with v; lines: that with v, or if there is `mean_with` the mean of
  // both
  View out;
  View mean_with;
  View second_out;      // whole: the first product; lines: that with other_v
  const void* sums[2];  // Acc [batch, heads, height, width]; lines: the first alone
  void* lse[2];         // as sums; may be absent
};

template <class Engine, class Form>
struct ForwardLayout {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  static constexpr int ROWS = Engine::ROWS;
  int ld_head, ld_value;
  int q, k, v, other_v, scratch, others, own_slab, other_slab;
  int64_t bytes;

  explicit ForwardLayout(const ForwardCall& call)
      : ld_head(leading_dimension<T>(call.head_dim)), ld_value(leading_dimension<T>(call.value_dim)) {
    Carver carver;
    others = carver.take<typename BesideTile<Engine, Form>::Type>(1);
    scratch = carver.take<T>(Engine::SCRATCH);
    q = carver.take<T>(ROWS * ld_head);
    k = carver.take<T>(ROWS * ld_head);
    v = carver.take<T>(ROWS * ld_value);
    other_v = carver.take<T>(present(call.other_v) ? ROWS * ld_value : 0);
    const int slab = BesideTile<Engine, Form>::SLABS ? call.field.slab_capacity(ROWS) : 0;
    own_slab = carver.take<Vec<Acc, 2>>(slab);
    other_slab = carver.take<Vec<Acc, 2>>(slab);
    bytes = carver.used();
  }
};

// An online softmax of this lane's two rows.
template <class T>
struct Softmax {
  using Acc = accumulate_t<T>;
  using Exp = Exponential<T>;
  Acc max[2] = {-INFINITY, -INFINITY};
  Acc sum[2] = {Acc(0), Acc(0)};  // of this lane's columns

  // Logits to exp(logits - max); `correction` is what earlier sums have to be multiplied by.
  template <int BLOCKS>
  VK_DEVICE void step(Acc (&p)[BLOCKS][4], Span seen, Acc (&correction)[2]) {
    Acc tile_max[2] = {-INFINITY, -INFINITY};
    VK_UNROLL
    for (int j = 0; j < BLOCKS; ++j) {
      if (8 * j + 8 <= seen.begin || 8 * j >= seen.end) continue;
      VK_UNROLL
      for (int c = 0; c < 4; ++c) tile_max[c / 2] = larger(p[j][c], tile_max[c / 2]);
    }
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Acc of_row = row_max(tile_max[r], max[r]);
      correction[r] = Exp::exp(max[r] - guard(of_row));
      max[r] = of_row;
      sum[r] *= correction[r];
    }
    Acc part[2] = {Acc(0), Acc(0)};  // a map has many tiles: one running sum would err more
    VK_UNROLL
    for (int j = 0; j < BLOCKS; ++j) {
      if (8 * j + 8 <= seen.begin || 8 * j >= seen.end) continue;
      VK_UNROLL
      for (int c = 0; c < 4; ++c) {
        p[j][c] = Exp::exp(p[j][c] - guard(max[c / 2]));
        part[c / 2] += p[j][c];
      }
    }
    sum[0] += part[0];
    sum[1] += part[1];
  }
  VK_DEVICE void finish() {
    VK_UNROLL
    for (int r = 0; r < 2; ++r) sum[r] = warp_sum<4>(sum[r]);
  }
  VK_DEVICE Acc lse(int r) const { return (max[r] + Exp::log(sum[r])) * static_cast<Acc>(1.0 / Exp::unit); }

 private:
  VK_DEVICE static Acc row_max(Acc of_lane, Acc before) {
    const Acc of_row = warp_max<4>(of_lane);
    return of_row > before ? of_row : before;
  }
  VK_DEVICE static Acc guard(Acc x) { return x == -INFINITY ? Acc(0) : x; }  // -inf - -inf would be NaN
};

template <class Acc, int TILES>
VK_DEVICE void rescale(Acc (&sums)[TILES][4], const Acc (&factor)[2]) {
  VK_UNROLL
  for (int j = 0; j < TILES; ++j) {
    VK_UNROLL
    for (int c = 0; c < 4; ++c) sums[j][c] *= factor[c / 2];
  }
}

// Blocks of an SM that the registers must allow: latency is hidden by other blocks.
template <class T, class Form>
constexpr int FORWARD_MIN_BLOCKS = std::is_floating_point_v<T> ? 2
                                   : Form::WHOLE               ? 4
                                   : !Form::ALONE              ? 4
                                   : Form::COLUMNS > 16        ? 5
                                                               : 6;

// TWO_VALUES: lines, two products, the second perhaps with other values.
template <class Engine, class Form, bool TWO_VALUES>
VK_KERNEL void VK_LAUNCH_BOUNDS(Group<Engine::ROWS>::THREADS, (FORWARD_MIN_BLOCKS<typename Engine::T, Form>))
    forward_kernel(ForwardCall call, ForwardLayout<Engine, Form> layout) {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  constexpr bool WHOLE = Form::WHOLE, ALONE = Form::ALONE, TWO_PRODUCTS = WHOLE || TWO_VALUES;
  using Tile = BesideTile<Engine, Form>;
  constexpr int COLUMNS = Form::COLUMNS;
  constexpr int ROWS = Engine::ROWS, BLOCKS = ROWS / 8, THREADS = Group<ROWS>::THREADS;

  const Field& field = call.field;
  const Group<ROWS> group;
  const Item item = field.item(block_x());
  char* const base = shared_memory();
  const auto at = [&](int offset) { return reinterpret_cast<T*>(base + offset); };
  auto& others = *reinterpret_cast<typename Tile::Type*>(base + layout.others);
  auto* const own_slab = reinterpret_cast<Vec<Acc, 2>*>(base + layout.own_slab);
  auto* const other_slab = reinterpret_cast<Vec<Acc, 2>*>(base + layout.other_slab);
  T *const q = at(layout.q), *const k = at(layout.k), *const v = at(layout.v),
           *const other_v = at(layout.other_v);
  T* const scratch = at(layout.scratch) + group.first_row * (Engine::SCRATCH / ROWS);

  const int lane_row = group.first_row + lane_id() / 4, lane_column = lane_id() % 4 * 2;
  const int depth = round_up(call.head_dim, 16), value_blocks = round_up(call.value_dim, 16) / 8;
  const int64_t plane = field.plane(item.batch, item.head);
  const Sums<T> sums{static_cast<const Acc*>(call.sums[0]) + plane,
                     WHOLE ? static_cast<const Acc*>(call.sums[1]) + plane : nullptr};
  const Acc scale = static_cast<Acc>(call.scale * Exponential<T>::unit);
  const auto matrix = [&](const View& view, int channels) {
    return Matrix<T, Field>(view, field, item.batch, item.head, channels);
  };
  const auto query = [&](int slot) {
    return field.token<WHOLE, Form::ROW_SLOTS>(ROWS, item.group, item.tile, slot);
  };

  load_tile(q, layout.ld_head, matrix(call.q, call.head_dim), group, query);
  if (Tile::SLABS) load_slab(own_slab, field, sums, ROWS, item.tile, group.thread, THREADS);
  typename Tile::Logits logits;
  logits.stand(field, sums, item.group, item.tile, lane_row);

  Acc first[COLUMNS / 8][4], second[TWO_PRODUCTS ? COLUMNS / 8 : 1][4];
  clear(first);
  clear(second);
  Softmax<T> softmax, other_softmax;

  for (int i = 0; i < field.tiles; ++i) {
    const auto key = [&](int slot) { return field.token<WHOLE, Form::ROW_SLOTS>(ROWS, item.group, i, slot); };
    const Span seen = field.template slots_met<ALONE>(ROWS, i, group.first_row);
    load_tile(k, layout.ld_head, matrix(call.k, call.head_dim), group, key);
    cp_async_commit();
    load_tile(v, layout.ld_value, matrix(call.v, call.value_dim), group, key);
    if (TWO_VALUES) load_tile(other_v, layout.ld_value, matrix(call.other_v, call.value_dim), group, key);
    cp_async_commit();
    for (int slot = group.thread; slot < ROWS; slot += THREADS)
      Tile::put(others, field, sums, i, slot, key(slot));
    if (Tile::SLABS) load_slab(other_slab, field, sums, ROWS, i, group.thread, THREADS);
    cp_async_wait<1>();  // all but the values
    group.sync();

    // One mask after the other, from scores made anew: both at once would take 32 registers more, and a
    // block.
    Acc p[BLOCKS][4], correction[2];
    const auto score = [&] {
      clear(p);
      multiply_rows<Engine>(p, q + group.first_row * layout.ld_head, layout.ld_head, k, layout.ld_head, depth,
                            seen);
    };
    score();
    logits.template make<WHOLE ? Mask::own : Mask::line>(p, scale, field, others, own_slab, i, seen);
    softmax.step(p, seen, correction);
    rescale(first, correction);

    cp_async_wait<0>();
    group.sync();
    multiply_registers<Engine>(first, p, scratch, v, layout.ld_value, value_blocks, seen);
    if constexpr (WHOLE) {
      score();
      logits.template make<Mask::other>(p, scale, field, others, other_slab, i, seen);
      other_softmax.step(p, seen, correction);
      rescale(second, correction);
      multiply_registers<Engine>(second, p, scratch, v, layout.ld_value, value_blocks, seen);
    } else if constexpr (TWO_VALUES) {
      rescale(second, correction);
      multiply_registers<Engine>(second, p, scratch, other_v, layout.ld_value, value_blocks, seen);
    }
    group.sync();  // before the next tile, or the output, overwrites keys and values
  }

  softmax.finish();
  if constexpr (WHOLE) other_softmax.finish();
  VK_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int token = query(lane_row + 8 * r);
    if (lane_column != 0 || token < 0) continue;
    if (call.lse[0] != nullptr) static_cast<Acc*>(call.lse[0])[plane + field.index(token)] = softmax.lse(r);
    if (WHOLE && call.lse[1] != nullptr)
      static_cast<Acc*>(call.lse[1])[plane + field.index(token)] = other_softmax.lse(r);
  }
  const Acc one = Acc(1), factor[2] = {one / softmax.sum[0], one / softmax.sum[1]};
  rescale(first, factor);
  if constexpr (TWO_PRODUCTS) {
    const auto& second_softmax = WHOLE ? other_softmax : softmax;
    const Acc second_factor[2] = {one / second_softmax.sum[0], one / second_softmax.sum[1]};
    rescale(second, second_factor);
    if (present(call.second_out))
      store_sums(matrix(call.second_out, call.value_dim), v, layout.ld_value, WHOLE ? first : second, one,
                 one, group, query);
  }
  const Matrix<T, Field> out = matrix(call.out, call.value_dim);
  const bool mean = WHOLE || present(call.mean_with);
  if constexpr (WHOLE) {
    VK_UNROLL
    for (int j = 0; j < COLUMNS / 8; ++j) {
      VK_UNROLL
      for (int c = 0; c < 4; ++c) first[j][c] += second[j][c];
    }
  } else if (mean) {
    load_tile(v, layout.ld_value, matrix(call.mean_with, call.value_dim), group, query);
    cp_async_commit();
    cp_async_wait<0>();
    group.sync();
    add_tile(first, v + group.first_row * layout.ld_value, layout.ld_value, value_blocks, one, one);
  }
  const Acc half = mean ? Acc(0.5) : one;
  store_sums(out, v, layout.ld_value, first, half, half, group, query);
}

}  // namespace vitkernels::polyline_path_attention
