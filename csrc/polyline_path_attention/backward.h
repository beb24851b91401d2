// The backward kernel. Deterministic: every sum has one owner and a fixed order.
//
// With G = grad_out / 2, P the probabilities and D = P * (dP - delta) the gradient of the logits:
//   whole         dP = G v^T, delta = G . (P v), for both P; grad_q = scale D k and grad_k = scale D^T q with
//                 the sum D of both; grad_v = (P + P')^T G
//   criss-cross   dP = G (A_h v)^T + dY1 v^T in the rows, G (A_w v)^T + dY2 v^T in the columns, where
//                 dY1 = A_h^T G and dY2 = A_w^T G; grad_v = A_w^T dY1 + A_h^T dY2
//
// One kernel for both sides. A block owns a tile of queries and sees all tiles of keys, or owns keys and sees
// queries: then the probabilities it computes are transposed, and stand in its registers as the left operand
// of the products with q and with G as they stood, in a block of queries, for that with k. Nothing goes
// through shared memory but, for the decays of the whole mode, the gradients of one mask.
#pragma once
#include "aligned.h"
#include "corners.h"

namespace vitkernels::polyline_path_attention {

// Own: queries x = q, z = (grad_out, further gradients); or keys x = k, z = (values). Others: y and w, the
// other way around. Strides are (batch, head, x, channel, y).
struct BackwardCall {
  Field field;
  int head_dim = 0, value_dim = 0;
  double scale = 0;
  View x{}, y{};
  View z[2] = {}, w[2] = {};  // dP = z[0] w[0]^T / 2 + z[1] w[1]^T; the latter may be absent
  View grad_x{};              // scale D y, may be absent
  View grad_z{};              // keys: P w[product] * product_factor, may be absent
  int product = 0;            // 1 where there are two pairs
  double product_factor = 1.0;
  bool adds_x = false, adds_z = false;  // to what there is
  int channel = 0;                      // the first of at most MOST_COLUMNS channels of grad_x and grad_z

  // Acc [batch, heads, height, width]. Whole: of the mask with its corner in the own row, and of the other;
  // lines: the first alone.
  const void* lse[2] = {};
  void* delta[2] = {};       // of the queries; absent where D is not needed
  bool makes_delta = false;  // queries that see one tile of keys: delta = sum(P * dP), which no rounding of a
                             // product has been through, is written instead of read
  const void* sums[2] = {};  // along the rows, down the columns; lines: that of their direction

  // Gradients of the cumulative sums; see SumGradients. Absent: not wanted. Where the rows of a map have
  // slots of their own those of the corners are among them, elsewhere they are in `corners`.
  void* grad_sums[2] = {};
  void* corners = nullptr;
};

template <class Engine, class Form>
struct BackwardLayout {
  using Tile = BesideTile<Engine, Form>;
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  static constexpr int ROWS = Engine::ROWS;
  static constexpr int LD_GRADIENT = ROWS + 8;
  static constexpr bool WHOLE = Form::WHOLE;
  int ld_head, ld_value;
  int x, y, z[2], w[2];
  int scratch, others, statistics, own_slab, other_slab, gradient, corners;
  int64_t bytes;

  BackwardLayout(const BackwardCall& call, bool with_decays)
      : ld_head(leading_dimension<T>(call.head_dim)), ld_value(leading_dimension<T>(call.value_dim)) {
    Carver carver;
    others = carver.take<typename Tile::Type>(1);
    statistics = carver.take<Vec<Acc, 2>>((WHOLE ? 2 : 1) * ROWS);
    scratch = carver.take<T>(Engine::SCRATCH);
    x = carver.take<T>(ROWS * ld_head);
    y = carver.take<T>(ROWS * ld_head);
    const int elements = ROWS * ld_value, further = WHOLE ? 0 : elements;
    z[0] = carver.take<T>(elements);
    z[1] = carver.take<T>(further);
    w[0] = carver.take<T>(elements);
    // Where not both fit, one follows the other through the same memory.
    const bool in_turn =
        carver.used() + further * static_cast<int64_t>(sizeof(T)) > tile_attention::SHARED_LIMIT;
    w[1] = in_turn ? w[0] : carver.take<T>(further);
    const int slab = Tile::SLABS ? call.field.slab_capacity(ROWS) : 0;
    own_slab = carver.take<Vec<Acc, 2>>(slab);
    other_slab = carver.take<Vec<Acc, 2>>(slab);
    gradient = carver.take<Acc>(Tile::SLABS && with_decays ? ROWS * LD_GRADIENT : 0);
    corners = carver.take<Vec<Acc, 2>>(with_decays ? slab : 0);
    bytes = carver.used();
  }
};

enum class Own { queries, keys };

// Rows of the tiles of a mode, a function of the sizes only.
int whole_rows(const Params& params);
int line_rows(const Params& params);
// Run the kernel for all channels, some at a time; the call's field is made of tiles of those rows.
void backward_whole(DType dtype, Own own, int rows, const BackwardCall& call, Stream stream);
void backward_lines(DType dtype, Own own, int rows, const BackwardCall& call, Stream stream);

// Blocks of an SM that the registers must allow: latency is hidden by other blocks. More would spill.
template <class T, Own OWN, class Form>
constexpr int BACKWARD_MIN_BLOCKS = Form::WHOLE || std::is_floating_point_v<T>   ? 2
                                    : OWN == Own::queries || Form::COLUMNS == 16 ? 4
                                                                                 : 3;

template <class Engine, Own OWN, class Form>
VK_KERNEL void VK_LAUNCH_BOUNDS(Group<Engine::ROWS>::THREADS,
                                (BACKWARD_MIN_BLOCKS<typename Engine::T, OWN, Form>))
    backward_kernel(BackwardCall call, BackwardLayout<Engine, Form> layout) {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  using Tile = BesideTile<Engine, Form>;
  constexpr bool WHOLE = Form::WHOLE, ALONE = Form::ALONE, CORNERS = Tile::SLABS;
  constexpr int COLUMNS = Form::COLUMNS, ROW_SLOTS = Form::ROW_SLOTS;
  using Exp = Exponential<T>;
  constexpr int ROWS = Engine::ROWS, BLOCKS = ROWS / 8, THREADS = Group<ROWS>::THREADS;
  constexpr int LD_GRADIENT = BackwardLayout<Engine, Form>::LD_GRADIENT, MASKS = WHOLE ? 2 : 1;

  const Field& field = call.field;
  const Group<ROWS> group;
  const Item item = field.item(block_x());
  char* const base = shared_memory();
  const auto at = [&](int offset) { return reinterpret_cast<T*>(base + offset); };
  auto& others = *reinterpret_cast<typename Tile::Type*>(base + layout.others);
  auto* const statistics = reinterpret_cast<Vec<Acc, 2>*>(base + layout.statistics);
  auto* const own_slab = reinterpret_cast<Vec<Acc, 2>*>(base + layout.own_slab);
  auto* const other_slab = reinterpret_cast<Vec<Acc, 2>*>(base + layout.other_slab);
  auto* const corners = reinterpret_cast<Vec<Acc, 2>*>(base + layout.corners);
  Acc* const gradient = reinterpret_cast<Acc*>(base + layout.gradient);
  const int row0 = group.first_row, lane_row = row0 + lane_id() / 4, lane_column = lane_id() % 4 * 2;
  T* const scratch = at(layout.scratch) + row0 * (Engine::SCRATCH / ROWS);

  const int ld_head = layout.ld_head, ld_value = layout.ld_value;
  const int head_depth = round_up(call.head_dim, 16), value_depth = round_up(call.value_dim, 16);
  const int64_t plane = field.plane(item.batch, item.head);
  const auto of_plane = [&](const void* data) {
    return data == nullptr ? nullptr : static_cast<const Acc*>(data) + plane;
  };
  const Sums<T> sums{of_plane(call.sums[0]), WHOLE ? of_plane(call.sums[1]) : nullptr};
  const Acc scale = static_cast<Acc>(call.scale * Exp::unit);
  const bool want_decays = call.grad_sums[0] != nullptr;
  const bool want_d = present(call.grad_x) || want_decays || call.makes_delta;
  const bool two_pairs = !WHOLE && present(call.z[1]), in_turn = layout.w[1] == layout.w[0];
  const auto matrix = [&](const View& view, int channels) {
    return Matrix<T, Field>(view, field, item.batch, item.head, channels);
  };
  const auto own = [&](int slot) { return field.token<WHOLE, ROW_SLOTS>(ROWS, item.group, item.tile, slot); };
  // lse times unit, and delta, of a query; lse such that without a query P = 0
  const auto statistics_of = [&](int mask, int token) {
    if (token < 0) return Vec<Acc, 2>{{INFINITY, Acc(0)}};
    const Acc lse = of_plane(call.lse[mask])[field.index(token)] * static_cast<Acc>(Exp::unit);
    const Acc* delta = call.makes_delta ? nullptr : of_plane(call.delta[mask]);
    return Vec<Acc, 2>{{lse, delta == nullptr ? Acc(0) : delta[field.index(token)]}};
  };

  load_tile(at(layout.x), ld_head, matrix(call.x, call.head_dim), group, own);
  if (want_d) {
    load_tile(at(layout.z[0]), ld_value, matrix(call.z[0], call.value_dim), group, own);
    if (two_pairs) load_tile(at(layout.z[1]), ld_value, matrix(call.z[1], call.value_dim), group, own);
  }
  typename Tile::Logits logits;
  logits.stand(field, sums, item.group, item.tile, lane_row);
  if constexpr (CORNERS) {
    load_slab(own_slab, field, sums, ROWS, item.tile, group.thread, THREADS);
    if (want_decays) {  // corner e belongs to thread e % THREADS throughout, so these need no barrier
      for (int e = group.thread; e < field.slab_length(ROWS, item.tile); e += THREADS)
        corners[e] = {{Acc(0), Acc(0)}};
    }
  }
  Vec<Acc, 2> own_statistics[MASKS][2];
  if constexpr (OWN == Own::queries) {
    VK_UNROLL
    for (int mask = 0; mask < MASKS; ++mask) {
      VK_UNROLL
      for (int r = 0; r < 2; ++r) own_statistics[mask][r] = statistics_of(mask, own(lane_row + 8 * r));
    }
  }
  const auto statistics_at = [&](int mask, int r, int column) -> const Vec<Acc, 2>& {
    return OWN == Own::queries ? own_statistics[mask][r] : statistics[mask * ROWS + column];
  };
  const auto make_delta = [&](const auto& p, int mask, const auto& d, Span seen) {
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      Acc sum = Acc(0);
      VK_UNROLL
      for (int j = 0; j < BLOCKS; ++j) {
        if (8 * j + 8 <= seen.begin || 8 * j >= seen.end) continue;
        sum += p[j][2 * r] * d[j][2 * r] + p[j][2 * r + 1] * d[j][2 * r + 1];
      }
      own_statistics[mask][r][1] = warp_sum<4>(sum);
      const int token = own(lane_row + 8 * r);
      if (lane_column == 0 && token >= 0)
        static_cast<Acc*>(call.delta[mask])[plane + field.index(token)] = own_statistics[mask][r][1];
    }
  };

  Acc of_x[COLUMNS / 8][4], of_z[OWN == Own::keys ? COLUMNS / 8 : 1][4];
  clear(of_x);
  clear(of_z);
  Acc of_sums[MASKS][2];  // gradients of the cumulative sums at this lane's rows, from this lane's columns
  VK_UNROLL
  for (int mask = 0; mask < MASKS; ++mask) of_sums[mask][0] = of_sums[mask][1] = Acc(0);
  AlignedGradients<ROW_SLOTS == 0 ? 8 : ROW_SLOTS, ROWS> aligned_gradients;

  for (int i = 0; i < field.tiles; ++i) {
    const auto other = [&](int slot) { return field.token<WHOLE, ROW_SLOTS>(ROWS, item.group, i, slot); };
    const Span seen = field.template slots_met<ALONE>(ROWS, i, row0);
    load_tile(at(layout.y), ld_head, matrix(call.y, call.head_dim), group, other);
    if (want_d || call.product == 0)
      load_tile(at(layout.w[0]), ld_value, matrix(call.w[0], call.value_dim), group, other);
    const auto load_second = [&] {
      load_tile(at(layout.w[1]), ld_value, matrix(call.w[1], call.value_dim), group, other);
    };
    if (two_pairs && !in_turn) load_second();
    cp_async_commit();
    for (int slot = group.thread; slot < ROWS; slot += THREADS) {
      const int token = other(slot);
      Tile::put(others, field, sums, i, slot, token);
      if constexpr (OWN == Own::keys) {
        VK_UNROLL
        for (int mask = 0; mask < MASKS; ++mask) statistics[mask * ROWS + slot] = statistics_of(mask, token);
      }
    }
    if constexpr (CORNERS) load_slab(other_slab, field, sums, ROWS, i, group.thread, THREADS);
    cp_async_wait<0>();
    group.sync();

    Acc p[BLOCKS][4], other_p[WHOLE ? BLOCKS : 1][4];
    clear(p);
    multiply_rows<Engine>(p, at(layout.x) + row0 * ld_head, ld_head, at(layout.y), ld_head, head_depth, seen);
    if constexpr (WHOLE) {
      VK_UNROLL
      for (int j = 0; j < BLOCKS; ++j) {
        VK_UNROLL
        for (int c = 0; c < 4; ++c) other_p[j][c] = p[j][c];
      }
      logits.template make<Mask::own>(p, scale, field, others, own_slab, i, seen);
      logits.template make<Mask::other>(other_p, scale, field, others, other_slab, i, seen);
    } else {
      logits.template make<Mask::line>(p, scale, field, others, own_slab, i, seen);
    }
    Acc d[BLOCKS][4];
    clear(d);
    if (want_d) {
      multiply_rows<Engine>(d, at(layout.z[0]) + row0 * ld_value, ld_value, at(layout.w[0]), ld_value,
                            value_depth, seen);
      VK_UNROLL
      for (int j = 0; j < BLOCKS; ++j) {
        VK_UNROLL
        for (int c = 0; c < 4; ++c) d[j][c] *= Acc(0.5);
      }
    }
    if (two_pairs) {
      if (in_turn) {
        group.sync();
        load_second();
        cp_async_commit();
        cp_async_wait<0>();
        group.sync();
      }
      if (want_d)
        multiply_rows<Engine>(d, at(layout.z[1]) + row0 * ld_value, ld_value, at(layout.w[1]), ld_value,
                              value_depth, seen);
    }
    VK_UNROLL
    for (int j = 0; j < BLOCKS; ++j) {
      if (8 * j + 8 <= seen.begin || 8 * j >= seen.end) continue;
      VK_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int column = 8 * j + lane_column + c % 2;
        p[j][c] = Exp::exp(p[j][c] - statistics_at(0, c / 2, column)[0]);
        if constexpr (WHOLE) other_p[j][c] = Exp::exp(other_p[j][c] - statistics_at(1, c / 2, column)[0]);
      }
    }
    if constexpr (OWN == Own::queries) {
      if (call.makes_delta) {
        make_delta(p, 0, d, seen);
        if constexpr (WHOLE) make_delta(other_p, 1, d, seen);
      }
    }
    VK_UNROLL
    for (int j = 0; j < BLOCKS; ++j) {
      if (8 * j + 8 <= seen.begin || 8 * j >= seen.end) continue;
      Acc of_mask[4], of_other_mask[4];
      VK_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int column = 8 * j + lane_column + c % 2, r = c / 2;
        of_mask[c] = p[j][c] * (d[j][c] - statistics_at(0, r, column)[1]);
        if constexpr (WHOLE) {
          of_other_mask[c] = other_p[j][c] * (d[j][c] - statistics_at(1, r, column)[1]);
          if constexpr (CORNERS) {
            if (want_decays) {
              const auto &u = logits.own[r], &w = others[column];
              of_sums[0][r] += signed_or_zero(u.x() - w.x(), of_mask[c]);
              of_sums[MASKS - 1][r] += signed_or_zero(u.y() - w.y(), of_other_mask[c]);
            }
          }
          p[j][c] += other_p[j][c];
          d[j][c] = of_mask[c] + of_other_mask[c];
        } else {
          if (want_decays)
            of_sums[0][r] += signed_or_zero(logits.position[r] - i * ROWS + seen.begin - column, of_mask[c]);
          d[j][c] = of_mask[c];
        }
      }
      if constexpr (WHOLE && !CORNERS) {
        if (want_decays) aligned_gradients.add(logits, i, j, of_mask, of_other_mask);
      }
      if (CORNERS && want_decays) {
        Acc* row = gradient + lane_row * LD_GRADIENT + 8 * j + lane_column;
        Vec<Acc, 2>{{of_mask[0], of_mask[1]}}.store(row);
        Vec<Acc, 2>{{of_mask[2], of_mask[3]}}.store(row + 8 * LD_GRADIENT);
      }
    }
    if ((WHOLE ? field.tokens() : field.length) == 1)
      clear(d);  // exactly: what rounding left of dP - delta is no gradient
    if (present(call.grad_x) && call.channel < head_depth)
      multiply_registers<Engine>(of_x, d, scratch, at(layout.y) + call.channel, ld_head,
                                 round_up(channels_from(call.channel, call.head_dim), 16) / 8, seen);
    if constexpr (OWN == Own::keys) {
      if (present(call.grad_z) && call.channel < value_depth)
        multiply_registers<Engine>(of_z, p, scratch,
                                   at(call.product == 0 ? layout.w[0] : layout.w[1]) + call.channel, ld_value,
                                   round_up(channels_from(call.channel, call.value_dim), 16) / 8, seen);
    }
    group.sync();  // before the next tile overwrites an operand; and the gradients of the mask are there
    if constexpr (CORNERS) {
      if (want_decays) {
        add_corners<ROWS>(corners, gradient, LD_GRADIENT, field, item.tile, i, group.thread, THREADS);
        group.sync();  // before they are overwritten
      }
    }
  }

  // The others' tiles are free: the results go through them.
  const auto finish = [&](auto& result, const View& view, int channels, T* tile, int ld, bool adds,
                          double by) {
    if (!present(view) || call.channel >= channels) return;
    const Matrix<T, Field> target = matrix(view, channels_from(call.channel, channels));
    Acc factor = static_cast<Acc>(by);
    if (adds) {
      load_tile(tile, ld, target, group, own);
      cp_async_commit();
      cp_async_wait<0>();
      group.sync();
      add_tile(result, tile + row0 * ld, ld, round_up(target.channels, 16) / 8, factor, factor);
      factor = Acc(1);
    }
    store_sums(target, tile, ld, result, factor, factor, group, own);
  };
  finish(of_x, call.grad_x, call.head_dim, at(layout.y), ld_head, call.adds_x, call.scale);
  if constexpr (OWN == Own::keys)
    finish(of_z, call.grad_z, call.value_dim, at(layout.w[0]), ld_value, call.adds_z, call.product_factor);

  if (!want_decays) return;
  if constexpr (WHOLE && !CORNERS) {
    aligned_gradients.finish(logits, of_sums);
  } else {
    VK_UNROLL
    for (int mask = 0; mask < MASKS; ++mask) {
      VK_UNROLL
      for (int r = 0; r < 2; ++r) of_sums[mask][r] = warp_sum<4>(of_sums[mask][r]);
    }
  }
  VK_UNROLL
  for (int mask = 0; mask < MASKS; ++mask) {
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int token = own(lane_row + 8 * r);
      if (lane_column == 0 && token >= 0)
        static_cast<Acc*>(call.grad_sums[mask])[plane + field.index(token)] = of_sums[mask][r];
    }
  }
  if constexpr (CORNERS) {
    const int64_t tile =
        (static_cast<int64_t>(item.batch) * field.heads + item.head) * field.tiles + item.tile;
    auto* target = static_cast<Vec<Acc, 2>*>(call.corners) + tile * field.slab_capacity(ROWS);
    for (int e = group.thread; e < field.slab_length(ROWS, item.tile); e += THREADS) target[e] = corners[e];
  }
}

template <class Engine, bool WHOLE>
void backward_with(Own own, const BackwardCall& all, Stream stream) {
  using T = typename Engine::T;
  const int of_x = present(all.grad_x) ? all.head_dim : 0, of_z = present(all.grad_z) ? all.value_dim : 0;
  for (int channel = 0; channel == 0 || channel < (of_x > of_z ? of_x : of_z); channel += MOST_COLUMNS) {
    BackwardCall call = all;
    call.channel = channel;
    call.grad_x = from_channel<T>(all.grad_x, channel);
    call.grad_z = from_channel<T>(all.grad_z, channel);
    if (channel > 0) call.grad_sums[0] = nullptr;
    with_form<Engine, WHOLE>(call.field, of_x > of_z ? of_x : of_z, [&](auto form) {
      using Form = decltype(form);
      const auto kernel = own == Own::queries ? backward_kernel<Engine, Own::queries, Form>
                                              : backward_kernel<Engine, Own::keys, Form>;
      const BackwardLayout<Engine, Form> layout(all, all.grad_sums[0] != nullptr);
      launch_tiles(kernel, call, layout, Group<Engine::ROWS>::THREADS, stream);
    });
  }
}

template <bool WHOLE>
int backward_rows(const Params& params) {
  if (params.dtype == DType::f64) return 16;
  if (params.dtype != DType::f32) return 64;
  BackwardCall call{Field(params, WHOLE ? Sweep::whole : Sweep::rows, 64), params.head_dim, params.value_dim};
  return BackwardLayout<Engine<float>, Form<WHOLE, WHOLE, MOST_COLUMNS>>(call, true).bytes >
                 tile_attention::SHARED_LIMIT
             ? 16
             : 64;
}

template <bool WHOLE>
void backward_of(DType dtype, Own own, int rows, const BackwardCall& call, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, float>) {
      if (rows == 16) return backward_with<SmallEngine, WHOLE>(own, call, stream);
    }
    backward_with<Engine<T>, WHOLE>(own, call, stream);
  });
}

}  // namespace vitkernels::polyline_path_attention
