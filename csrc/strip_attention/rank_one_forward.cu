// softmax(s q k^T) v for one channel a query and a key. See rank_one.h for the idea and the floor.
#include "rank_one.h"

namespace vitkernels::strip_attention::rank_one {
namespace {

// A warp owns 16 STRIPS queries and all their sums; it meets the block's other warps only where tiles of keys
// arrive, and not at all after the first tile of queries where the keys are resident.
template <class T, int COLUMNS, int STRIPS>
VK_KERNEL void VK_LAUNCH_BOUNDS(BLOCK_THREADS, 4) forward_kernel(Call call, KeyLayout<T> layout) {
  const QueryItem item(call);
  const Unit& unit = item.unit;
  const int ld = layout.ld, blocks = round_up(call.value_dim, 16) / 8;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  T* const slab = reinterpret_cast<T*>(shared_memory() + layout.slabs) + warp_id() * layout.slab_rows * ld;
  const float unit_scale = call.scale * LOG2E;

  KeyTiles<T> tiles(call, layout, unit, item.end - item.begin);
  const Extremes extremes =
      find_extremes<T>(call, unit, reinterpret_cast<float*>(shared_memory() + layout.scratch));

  for (int tile = item.begin; tile < item.end; ++tile) {
    int first = (tile * WARPS + warp_id()) * 16 * STRIPS;  // query of this warp
    float q[2 * STRIPS], extreme[2 * STRIPS], row_sum[2 * STRIPS];
    VK_UNROLL
    for (int r = 0; r < 2 * STRIPS; ++r) {
      const int token = first + 8 * r + g;
      q[r] = token < call.queries ? to_float(unit.scalar<T>(call.q, token)) * unit_scale : 0.0f;
      extreme[r] = extremes.of(q[r]);
      row_sum[r] = 0.0f;
    }
    float sums[STRIPS][COLUMNS / 8][4];
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s) tile_attention::clear(sums[s]);

    for (int k = 0; k < call.keys; k += TILE) {
      tiles.next(k / TILE);
      if (first >= call.queries) continue;
      const int here = call.keys - k < TILE ? call.keys - k : TILE;
      const float* const keys = tiles.keys() + 2 * t;
      const T* const values = tiles.values() + (lane & 15) * ld + (lane >> 4) * 8;
      VK_NO_UNROLL
      for (int m = 0; m < here; m += 16) {
        const auto low = Vec<float, 2>::load(keys + m), high = Vec<float, 2>::load(keys + m + 8);
        const float key[4] = {low[0], low[1], high[0], high[1]};
        uint32_t left[STRIPS][4];
        VK_UNROLL
        for (int r = 0; r < 2 * STRIPS; ++r) {
          float p[4], part = 0.0f;
          VK_UNROLL
          for (int c = 0; c < 4; ++c) {
            p[c] = exp2_fast(q[r] * (key[c] - extreme[r]));
            // A key that does not exist has values of zero, so only the sum has to leave it out.
            if (m + 2 * t + c % 2 + c / 2 * 8 < here) part += p[c];
          }
          row_sum[r] += part;
          left[r / 2][r % 2] = pack2<T>(p[0], p[1]);
          left[r / 2][r % 2 + 2] = pack2<T>(p[2], p[3]);
        }
        VK_UNROLL
        for (int j = 0; j < COLUMNS / 8; j += 2) {
          if (j >= blocks) break;
          uint32_t right[4];
          ldmatrix_x4_trans(right, values + m * ld + j * 8);
          VK_UNROLL
          for (int s = 0; s < STRIPS; ++s) {
            mma_m16n8k16<T>(sums[s][j], left[s], {right[0], right[1]});
            mma_m16n8k16<T>(sums[s][j + 1], left[s], {right[2], right[3]});
          }
        }
      }
    }

    forget(first);  // lest addresses wait in registers for the end of the loop
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s) {
      float factor[2];
      VK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int r = 2 * s + i, token = first + 8 * r + g;
        const float total = warp_sum<4>(row_sum[r]);
        factor[i] = 1.0f / total;
        if (t == 0 && token < call.queries && present(call.lse))
          unit.scalar<float>(call.lse, token) = (q[r] * extreme[r] + log2_fast(total)) * LN2;
      }
      tile_attention::write_sums(slab + 16 * s * ld, ld, sums[s], blocks, factor[0], factor[1]);
    }
    sync_warp();
    VK_UNROLL
    for (int s = 0; s < STRIPS; ++s) {
      store_tile(unit.matrix<T>(call.out, call.value_dim), slab + 16 * s * ld, ld, Group<16>(), [&](int slot) {
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
