// dW = dY^T Phi on Hopper, by asynchronous products of warpgroups over the rows: both operands lie in shared
// memory with the rows as features. As in the forward, Phi of the next stage is made while the tensor cores
// multiply the present one.
//
// A stage is 64 rows. For 256 outputs and 16 channels it is 1024 cycles of the tensor cores at their peak
// against about 600 issue slots of the four schedulers and 32 bytes a cycle of dY from L2; for 128 outputs
// and 32 channels 1000 slots and 16 bytes. Blocks split the rows so that they fill the GPU once, and their
// partial sums are added in order.
#include "hopper.h"
#include "vitkernels/matrix_copy.h"

namespace vitkernels::kan_linear {
namespace {

constexpr int64_t LEAST_SHARE = 256;  // rows

// Two warpgroups, each with BLOCKS times 64 outputs by COLUMNS columns of Phi.
template <int BLOCKS_, int COLUMNS_>
struct WeightTile {
  static constexpr int GROUPS = 2, THREADS = 128 * GROUPS, BLOCKS = BLOCKS_, COLUMNS = COLUMNS_;
  static constexpr int OUTPUTS = 64 * GROUPS * BLOCKS, CHANNELS = COLUMNS / CENTRES, ROWS = 64;
  static constexpr int BLOCK_BYTES = ROWS * STAGE_BYTES;  // rows by 64 outputs or columns
  static constexpr int PHI_STAGES = 3, GRAD_STAGES = 4;   // as in the forward
  static constexpr int PHI_BYTES = COLUMNS / 64 * BLOCK_BYTES, GRAD_BYTES = OUTPUTS / 64 * BLOCK_BYTES;
  static constexpr int RING_BYTES = PHI_STAGES * PHI_BYTES + GRAD_STAGES * GRAD_BYTES;
  static constexpr size_t SHARED_BYTES =
      RING_BYTES + sizeof(float) * 2 * (CENTRES + CHANNELS) + sizeof(Arrival) * GRAD_STAGES;

  static int64_t tiles(int channels, int outputs) {
    return static_cast<int64_t>((channels + CHANNELS - 1) / CHANNELS) * ((outputs + OUTPUTS - 1) / OUTPUTS);
  }
};

// run(WeightTile{}): the one of more outputs makes Phi less often.
template <class Run>
auto with_weight_tile(int outputs, const Run& run) {
  return outputs > 128 ? run(WeightTile<2, 128>{}) : run(WeightTile<1, 256>{});
}

template <class X, class T, class R, class Tile>
VK_KERNEL void VK_LAUNCH_BOUNDS(Tile::THREADS, 1)
    hopper_weight_kernel(Problem<X, T> p, const VK_GRID_CONSTANT MatrixMap grad_map, R* result,
                         int64_t result_row, int64_t result_share, int64_t share) {
#if defined(VK_WGMMA)
  constexpr int COLUMNS = Tile::COLUMNS, ROWS = Tile::ROWS;
  char* const phi = shared_memory();
  char* const grad = phi + Tile::PHI_STAGES * Tile::PHI_BYTES;
  float* const tables = reinterpret_cast<float*>(phi + Tile::RING_BYTES);
  float *const scale = tables + 2 * CENTRES, *const shift = scale + Tile::CHANNELS;
  const int slices = (p.channels + Tile::CHANNELS - 1) / Tile::CHANNELS;
  const int first_output = block_x() / slices * Tile::OUTPUTS;
  const int first_channel = block_x() % slices * Tile::CHANNELS;
  const int channels = p.channels - first_channel;
  const int64_t begin = block_y() * share;
  const int rows = static_cast<int>(p.rows - begin < share ? p.rows - begin : share);
  const int stages = (rows + ROWS - 1) / ROWS;

  // Only the last share ends within a stage, so that rows beyond a share's last are beyond the matrix's:
  // zeros.
  Arrival* const arrivals = reinterpret_cast<Arrival*>(shift + Tile::CHANNELS);
  const auto fetch = [&](int stage) {
    if (stage >= stages || thread_x() != 0) return;
    const int place = stage % Tile::GRAD_STAGES;
    expect_arrival(arrivals + place, Tile::GRAD_BYTES);
    VK_UNROLL
    for (int i = 0; i < Tile::OUTPUTS / 64; ++i)
      copy_tile(grad + place * Tile::GRAD_BYTES + i * Tile::BLOCK_BYTES, grad_map, first_output + 64 * i,
                static_cast<int>(begin) + stage * ROWS, arrivals + place);
  };
  if (thread_x() == 0) prepare_arrivals(arrivals, Tile::GRAD_STAGES);
  fetch(0);
  fetch(1);

  const bool narrow = prepare_centres(tables, p);
  if (thread_x() < Tile::CHANNELS) {
    const int channel = first_channel + (thread_x() < channels ? thread_x() : 0);
    scale[thread_x()] = p.ln_weight[channel] * p.exponent_unit();
    shift[thread_x()] = p.ln_bias[channel] * p.exponent_unit();
  }
  sync_block();

  // A thread makes four channels of a row of every other block of Phi. Rows beyond the last, whose dY is
  // zero, are its likeness; channels beyond the last are the tile's first, and not stored.
  constexpr int MINE = COLUMNS / 64 / Tile::GROUPS;
  const int r = thread_x() % 128 / 2, half = thread_x() % 2 * (SLICE / 2), group = warp_id() / 4;
  const int phi_place = group * Tile::BLOCK_BYTES + r * STAGE_BYTES + chunk_of<STAGE_BYTES>(r, half) * 16;
  struct Mine {
    FourOf<X> values[MINE];
    float rstd, mean;
  };
  const auto load = [&](int stage) {
    int row = stage * ROWS + r;
    row = row < rows ? row : rows - 1;
    const int64_t place = begin + row;
    Mine mine;
    mine.rstd = p.rstd[place];
    mine.mean = p.mean[place];
    VK_UNROLL
    for (int i = 0; i < MINE; ++i) {
      const int slice = (i * Tile::GROUPS + group) * SLICE;
      mine.values[i] =
          load_four(p.x + place * p.x_row + first_channel + (slice < channels ? slice : 0) + half);
    }
    return mine;
  };
  const auto make_phi = [&](int ring, const Mine& mine) {
    const float centre = -mine.mean * mine.rstd;
    VK_UNROLL
    for (int i = 0; i < MINE; ++i) {
      const float* parameters = scale + (i * Tile::GROUPS + group) * SLICE + half;
      const FourNorms norms{Vec<float, 4>::load(parameters),
                            Vec<float, 4>::load(parameters + Tile::CHANNELS)};
      const int place = phi_place + ring + i * Tile::GROUPS * Tile::BLOCK_BYTES;
      make_four<T>(decays_of<X>(mine.values[i], mine.rstd, centre, norms, narrow),
                   Centres(tables + (narrow ? 0 : CENTRES)), narrow,
                   [&](int c) { return reinterpret_cast<T*>(phi + (place ^ (c * 16))); });
    }
  };
  const Mine first = load(0);
  Mine next = load(1);  // a stage before Phi is made of it
  make_phi(0, first);

  float sums[Tile::BLOCKS][COLUMNS / 2];
  VK_UNROLL
  for (int b = 0; b < Tile::BLOCKS; ++b) {
    VK_UNROLL
    for (int i = 0; i < COLUMNS / 2; ++i) sums[b][i] = 0.0f;
    hold(sums[b]);
  }
  int ring = 0;  // where Phi of the stage is
  VK_NO_UNROLL
  for (int stage = 0; stage < stages; ++stage) {
    fence_async_proxy();
    wait_arrival(arrivals + stage % Tile::GRAD_STAGES, stage / Tile::GRAD_STAGES);
    // Of both warpgroups, the products up to the stage before the last are done here: their places are free.
    sync_block();
    using Features = Operand<STAGE_BYTES, Major::BY_FEATURES>;
    const Features right(phi + ring, Tile::BLOCK_BYTES);
    const char* const blocks =
        grad + stage % Tile::GRAD_STAGES * Tile::GRAD_BYTES + group * Tile::BLOCKS * Tile::BLOCK_BYTES;
    wgmma_fence();
    VK_UNROLL
    for (int k = 0; k < Tile::BLOCK_BYTES; k += 16 * STAGE_BYTES) {
      VK_UNROLL
      for (int b = 0; b < Tile::BLOCKS; ++b)
        wgmma<T, COLUMNS>(sums[b], Features(blocks + b * Tile::BLOCK_BYTES).advance(k), right.advance(k));
    }
    wgmma_commit();
    ring = ring + Tile::PHI_BYTES == Tile::PHI_STAGES * Tile::PHI_BYTES ? 0 : ring + Tile::PHI_BYTES;
    fetch(stage + 2);
    if (stage + 1 < stages) {
      const Mine now = next;
      next = load(stage + 2);
      make_phi(ring, now);
    }
    wgmma_wait<1>();
  }
  wgmma_wait<0>();

  constexpr float SCALE = Config<T>::PHI_SCALE;
  const int g = lane_id() / 4, t = lane_id() % 4;
  R* const target = result + block_y() * result_share + static_cast<int64_t>(first_channel) * CENTRES;
  VK_UNROLL
  for (int b = 0; b < Tile::BLOCKS; ++b) {
    hold(sums[b]);
    VK_UNROLL
    for (int low = 0; low < 2; ++low) {
      const int output = first_output + (group * Tile::BLOCKS + b) * 64 + warp_id() % 4 * 16 + g + 8 * low;
      if (output >= p.outputs) continue;
      R* const to = target + output * result_row + 2 * t;
      VK_UNROLL
      for (int j = 0; j < COLUMNS / 8; ++j) {
        if (j < channels)
          store_pair<R>(to + 8 * j, SCALE * sums[b][4 * j + 2 * low], SCALE * sums[b][4 * j + 2 * low + 1],
                        2);
      }
    }
  }
#endif
}

}  // namespace

WeightShares::WeightShares(int64_t rows, int channels, int outputs) {
  const int64_t tiles = with_weight_tile(outputs, [&](auto tile) { return tile.tiles(channels, outputs); });
  const int64_t gradient = static_cast<int64_t>(outputs) * channels * CENTRES * sizeof(float);
  shares = HOPPER_BLOCKS / tiles;
  if (shares > PARTIAL_BYTES / gradient) shares = PARTIAL_BYTES / gradient;
  if (shares > rows / LEAST_SHARE) shares = rows / LEAST_SHARE;
  if (shares < 1) shares = 1;
  constexpr int64_t STAGE = WeightTile<1, 256>::ROWS;
  share = ((rows + shares - 1) / shares + STAGE - 1) / STAGE * STAGE;
  shares = (rows + share - 1) / share;
}

template <class X, class T, class R>
void launch_hopper_weight(const Problem<X, T>& p, const WeightShares& shares, R* result, int64_t result_row,
                          int64_t result_share, Stream stream) {
  with_weight_tile(p.outputs, [&](auto tile) {
    using Tile = decltype(tile);
    launch(hopper_weight_kernel<X, T, R, Tile>, Dim3{Tile::tiles(p.channels, p.outputs), shares.shares},
           Tile::THREADS, Tile::SHARED_BYTES, stream, p,
           map_matrix(p.grad_y, p.rows, p.outputs, p.grad_row, Tile::ROWS), result, result_row, result_share,
           shares.share);
  });
}

#define VK_INSTANTIATE(X, T, R) \
  template void launch_hopper_weight(const Problem<X, T>&, const WeightShares&, R*, int64_t, int64_t, Stream);
VK_INSTANTIATE(half_t, half_t, half_t)
VK_INSTANTIATE(half_t, half_t, float)
VK_INSTANTIATE(float, half_t, half_t)
VK_INSTANTIATE(float, half_t, float)
VK_INSTANTIATE(bfloat16_t, bfloat16_t, bfloat16_t)
VK_INSTANTIATE(bfloat16_t, bfloat16_t, float)
VK_INSTANTIATE(float, bfloat16_t, bfloat16_t)
VK_INSTANTIATE(float, bfloat16_t, float)
#undef VK_INSTANTIATE

}  // namespace vitkernels::kan_linear
