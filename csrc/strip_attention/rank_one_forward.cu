// softmax(s q k^T) v for one channel a query and a key. See rank_one.h for the idea and the floor.
#include "rank_one.h"

namespace vitkernels::strip_attention::rank_one {
namespace {

// Blocks of an SM that the registers must allow.
template <class T>
constexpr int FORWARD_MIN_BLOCKS = std::is_floating_point_v<T> ? 2 : 4;

// A warp owns 16 STRIPS queries and all their sums; it meets the block's other warps only where tiles of keys
// arrive, and not at all after the first tile of queries where the keys are resident.
template <class T, int COLUMNS, int STRIPS>
VK_KERNEL void VK_LAUNCH_BOUNDS(BLOCK_THREADS, (FORWARD_MIN_BLOCKS<T>))
    forward_kernel(Call call, KeyLayout<T> layout) {
  using Acc = accumulate_t<T>;
  using Exp = Exponential<T>;
  constexpr bool PARTS = std::is_floating_point_v<T>;
  const QueryItem item(call);
  const Unit& unit = item.unit;
  const int ld = layout.ld, blocks = round_up(call.value_dim, 16) / 8;
  const int g = lane_id() / 4, t = lane_id() % 4;
  T* const slab = reinterpret_cast<T*>(shared_memory() + layout.slabs) + warp_id() * layout.slab_rows * ld;
  T* const step = reinterpret_cast<T*>(shared_memory() + layout.steps) + warp_id() * STEP<T>;
  const Acc scale = static_cast<Acc>(call.scale * Exp::unit);

  KeyTiles<T> tiles(call, layout, unit, item.end - item.begin);
  const Extremes<Acc> extremes =
      find_extremes<T>(call, unit, reinterpret_cast<Acc*>(shared_memory() + layout.scratch));

  for (int tile = item.begin; tile < item.end; ++tile) {
    int first = (tile * WARPS + warp_id()) * 16 * STRIPS;  // query of this warp
    Acc q[2 * STRIPS], extreme[2 * STRIPS], row_sum[2 * STRIPS];
    VK_UNROLL
    for (int r = 0; r < 2 * STRIPS; ++r) {
      const int token = first + 8 * r + g;
      q[r] = token < call.queries ? to_accumulate(unit.scalar<T>(call.q, token)) * scale : Acc(0);
      extreme[r] = extremes.of(q[r]);
      row_sum[r] = Acc(0);
    }
    Acc sums[STRIPS][COLUMNS / 8][4];
    clear_all(sums);

    for (int k = 0; k < call.keys; k += TILE) {
      tiles.next(k / TILE);
      if (first >= call.queries) continue;
      const int here = call.keys - k < TILE ? call.keys - k : TILE;
      Acc of_tile[STRIPS][COLUMNS / 8][4];
      if (PARTS) clear_all(of_tile);
      VK_NO_UNROLL
      for (int m = 0; m < here; m += 16) {
        Acc p[STRIPS][2][4];
        Acc part[2 * STRIPS] = {};
        VK_UNROLL
        for (int c = 0; c < 4; ++c) {
          const int column = m + c / 2 * 8 + 2 * t + c % 2;
          const Acc key = tiles.keys()[column];
          VK_UNROLL
          for (int r = 0; r < 2 * STRIPS; ++r) {
            const Acc value = Exp::exp(q[r] * (key - extreme[r]));
            p[r / 2][c / 2][r % 2 * 2 + c % 2] = value;
            // A key that does not exist has values of zero, so only the sum has to leave it out.
            if (column < here) part[r] += value;
          }
        }
        VK_UNROLL
        for (int r = 0; r < 2 * STRIPS; ++r) row_sum[r] += part[r];
        multiply_step(PARTS ? of_tile : sums, p, step, tiles.values() + m * ld, ld, blocks);
      }
      if (PARTS) add(sums, of_tile);
    }

    forget(first);  // lest addresses wait in registers for the end of the loop
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s) {
      Acc factor[2];
      VK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int r = 2 * s + i, token = first + 8 * r + g;
        const Acc total = warp_sum<4>(row_sum[r]);
        factor[i] = Acc(1) / total;
        if (t == 0 && token < call.queries && present(call.lse))
          unit.scalar<Acc>(call.lse, token) =
              (q[r] * extreme[r] + Exp::log(total)) * static_cast<Acc>(1.0 / Exp::unit);
      }
      write_sums(slab + 16 * s * ld, ld, sums[s], blocks, factor[0], factor[1]);
    }
    sync_warp();
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s) {
      store_tile(unit.matrix<T>(call.out, call.value_dim), slab + 16 * s * ld, ld, Group<16>(),
                 [&](int slot) {
                   const int token = first + 16 * s + slot;
                   return token < call.queries ? token : -1;
                 });
    }
    sync_warp();  // before the next tile's output takes the slab
  }
}

}  // namespace

void forward(const Params& params, Stream stream) {
  Call call(params);
  with_shape(params.dtype, call.queries, call.value_dim, [&](auto zero, auto columns, auto strips) {
    using T = decltype(zero);
    constexpr int ROWS = 16 * decltype(strips)::value;
    const KeyLayout<T> layout(call, ROWS);
    const int64_t blocks = split_queries(&call, WARPS * ROWS);
    launch(forward_kernel<T, decltype(columns)::value, decltype(strips)::value>, Dim3{blocks}, BLOCK_THREADS,
           static_cast<size_t>(layout.bytes), stream, call, layout);
  });
}

}  // namespace vitkernels::strip_attention::rank_one
