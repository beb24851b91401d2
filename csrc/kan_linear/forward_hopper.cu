// Forward on Hopper: y = Phi W^T by asynchronous products of warpgroups.
//
// While the tensor cores multiply a stage, 64 columns of Phi and of W, the warps that began its product make
// Phi of the next one from x; the copy engine brings W of the one after it. For 192 x 256 results a stage is
// 1536 cycles of the tensor cores at their peak. Beside it 192 x 8 channels of Phi, 45 instructions and five
// special functions each, and what goes with them are 800 issue slots of each of the four schedulers and 480
// cycles of the special-function units; W comes from L2 for every tile of rows, 21 bytes a cycle, hence the
// tall tiles. With 128 outputs Phi takes longer than its product.
#include "hopper.h"
#include "vitkernels/matrix_copy.h"

namespace vitkernels::kan_linear {
namespace {

// A warpgroup has 64 rows.
template <int GROUPS_, int OUTPUTS_>
struct Tile {
  static constexpr int GROUPS = GROUPS_, OUTPUTS = OUTPUTS_, ROWS = 64 * GROUPS, THREADS = 128 * GROUPS;
  // A stage's product may run until the barrier after the next one, which leaves Phi two stages ahead of the
  // one that is read; W is copied one stage earlier than Phi is made.
  static constexpr int PHI_STAGES = 3, WEIGHT_STAGES = 4;
  static constexpr int PHI_BYTES = ROWS * STAGE_BYTES, WEIGHT_BYTES = OUTPUTS * STAGE_BYTES;
  static constexpr int RING_BYTES = PHI_STAGES * PHI_BYTES + WEIGHT_STAGES * WEIGHT_BYTES;
  static constexpr int Y_LD = OUTPUTS + 8;  // results on their way out; keeps banks apart
  static_assert(RING_BYTES >= 2 * ROWS * Y_LD);

  static constexpr size_t SHARED_BYTES =
      RING_BYTES + sizeof(float) * 2 * (CENTRES + HOPPER_CHANNELS) + sizeof(Arrival) * WEIGHT_STAGES;
};

template <class X, class T, class Tile>
VK_KERNEL void VK_LAUNCH_BOUNDS(Tile::THREADS, 1)
    hopper_forward_kernel(Problem<X, T> p, const VK_GRID_CONSTANT MatrixMap weight_map, T* y, int64_t y_row) {
#if defined(VK_WGMMA)
  constexpr int OUTPUTS = Tile::OUTPUTS, THREADS = Tile::THREADS;
  char* const phi = shared_memory();
  char* const weight = phi + Tile::PHI_STAGES * Tile::PHI_BYTES;
  float* const tables = reinterpret_cast<float*>(phi + Tile::RING_BYTES);
  float* const scale = tables + 2 * CENTRES;  // of the norm, in the exponent; its shifts HOPPER_CHANNELS on
  const int64_t first_row = static_cast<int64_t>(block_x()) * Tile::ROWS;
  const int first_output = block_y() * OUTPUTS;
  const int outputs = p.outputs - first_output, stages = p.channels / SLICE;

  Arrival* const arrivals = reinterpret_cast<Arrival*>(scale + 2 * HOPPER_CHANNELS);
  const auto fetch = [&](int stage) {
    if (stage >= stages || thread_x() != 0) return;
    const int place = stage % Tile::WEIGHT_STAGES;
    expect_arrival(arrivals + place, Tile::WEIGHT_BYTES);
    copy_tile(weight + place * Tile::WEIGHT_BYTES, weight_map, stage * SLICE * CENTRES, first_output,
              arrivals + place);
  };
  if (thread_x() == 0) prepare_arrivals(arrivals, Tile::WEIGHT_STAGES);
  fetch(0);
  fetch(1);

  const bool narrow = prepare_centres(tables, p);
  for (int c = thread_x(); c < p.channels; c += THREADS) {
    scale[c] = p.ln_weight[c] * p.exponent_unit();
    scale[HOPPER_CHANNELS + c] = p.ln_bias[c] * p.exponent_unit();
  }
  sync_block();

  // A thread makes Phi of four channels of a row, so that a row's statistics stay in registers. Rows beyond
  // the last are its likeness, and not stored.
  const int r = thread_x() / 2, half = thread_x() % 2 * SLICE / 2;
  const int rows = p.rows - first_row < Tile::ROWS ? static_cast<int>(p.rows - first_row) : Tile::ROWS;
  const int64_t row = first_row + (r < rows ? r : rows - 1);
  const X* x = p.x + row * p.x_row + half;
  wait_for_launch();  // of the statistics
  const float rstd = p.rstd[row], centre = -p.mean[row] * rstd;
  const int phi_place = r * STAGE_BYTES + chunk_of<STAGE_BYTES>(r, half) * 16;
  const float* const centres = tables + (narrow ? 0 : CENTRES);
  constexpr bool HOLDS_CENTRES = Tile::GROUPS == 2 || OUTPUTS == 128;  // in registers, beside the sums
  const Centres held(centres);
  // What Phi of the thread's channels is made of, in steps that wait for nothing: x is read three stages
  // before its product, normed two and made Phi of one before.
  const auto norm = [&](int stage, const FourOf<X>& words) {
    const float* const parameters = scale + stage * SLICE + half;
    return decays_of<X>(words, rstd, centre,
                        {Vec<float, 4>::load(parameters), Vec<float, 4>::load(parameters + HOPPER_CHANNELS)},
                        narrow);
  };
  const auto make_phi = [&](int ring, const Vec<float, 4>& decays) {
    // Tiles begin at multiples of 1024 bytes, so that chunks are exchanged by an exclusive or of the whole.
    make_four<T>(decays, HOLDS_CENTRES ? held : Centres(centres), narrow,
                 [&](int c) { return reinterpret_cast<T*>(phi + ((phi_place + ring) ^ (c * 16))); });
  };
  // Of stages beyond the last, the last is read once more, so that no load is conditional.
  const auto next_x = [&](int stage) {
    x += stage < stages ? SLICE : 0;
    return load_four(x);
  };
  const auto first_x = load_four(x), second_x = next_x(1);
  auto values = next_x(2);
  make_phi(0, norm(0, first_x));
  auto decays = norm(stages > 1 ? 1 : 0, second_x);

  float sums[OUTPUTS / 2];
  VK_UNROLL
  for (int i = 0; i < OUTPUTS / 2; ++i) sums[i] = 0.0f;
  hold(sums);
  int ring = 0;  // where Phi of the stage is
  VK_NO_UNROLL
  for (int stage = 0; stage < stages; ++stage) {
    fence_async_proxy();
    wait_arrival(arrivals + stage % Tile::WEIGHT_STAGES, stage / Tile::WEIGHT_STAGES);
    // Of every warpgroup, the products up to the stage before the last are done here, and their places free:
    // that of Phi of the next stage is of two stages before, and so is that of W of the next but one.
    sync_block();
    using Rows = Operand<STAGE_BYTES, Major::FEATURES_SIDE_BY_SIDE>;
    const Rows left(phi + ring + warp_id() / 4 * 64 * STAGE_BYTES);
    const Rows right(weight + stage % Tile::WEIGHT_STAGES * Tile::WEIGHT_BYTES);
    wgmma_fence();
    VK_UNROLL
    for (int k = 0; k < STAGE_BYTES; k += 32) wgmma<T, OUTPUTS>(sums, left.advance(k), right.advance(k));
    wgmma_commit();
    ring = ring + Tile::PHI_BYTES == Tile::PHI_STAGES * Tile::PHI_BYTES ? 0 : ring + Tile::PHI_BYTES;
    fetch(stage + 2);
    const auto words = values;
    values = next_x(stage + 3);
    if (stage + 1 < stages) {
      make_phi(ring, decays);
      decays = norm(stage + 2 < stages ? stage + 2 : stage, words);
    }
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  hold(sums);
  sync_block();

  // Out by way of shared memory, a warp's 16 rows at a time, so that rows are written whole.
  T* const staged = reinterpret_cast<T*>(phi) + warp_id() * 16 * Tile::Y_LD;
  const int g = lane_id() / 4, t = lane_id() % 4;
  VK_UNROLL
  for (int j = 0; j < OUTPUTS / 8; ++j) {
    VK_UNROLL
    for (int low = 0; low < 2; ++low) {
      constexpr float SCALE = Config<T>::PHI_SCALE;
      const Vec<T, 2> pair{
          {from_float<T>(SCALE * sums[4 * j + 2 * low]), from_float<T>(SCALE * sums[4 * j + 2 * low + 1])}};
      pair.store(staged + (g + 8 * low) * Tile::Y_LD + 8 * j + 2 * t);
    }
  }
  sync_warp();
  const int64_t warp_row = first_row + warp_id() * 16;
  const bool aligned = reinterpret_cast<uintptr_t>(y) % 16 == 0 && y_row % 8 == 0;
  VK_NO_UNROLL
  for (int i = lane_id(); i < 16 * OUTPUTS / 8; i += 32) {
    const int line = i / (OUTPUTS / 8), column = i % (OUTPUTS / 8) * 8;
    if (warp_id() * 16 + line >= rows || column >= outputs) continue;
    const auto packed = Vec<T, 8>::load(staged + line * Tile::Y_LD + column);
    T* const to = y + (warp_row + line) * y_row + first_output + column;
    if (aligned && column + 8 <= outputs) {
      packed.store(to);
    } else {
      VK_UNROLL
      for (int e = 0; e < 8; ++e)
        if (column + e < outputs) to[e] = packed[e];
    }
  }
#endif
}

// Cycles of a launch: the wider of the product and of making Phi, and what runs before and after.
template <class Tile>
int64_t estimate(int64_t rows, int channels, int outputs, int processors) {
  const int64_t tiles =
      (rows + Tile::ROWS - 1) / Tile::ROWS * ((outputs + Tile::OUTPUTS - 1) / Tile::OUTPUTS);
  const int64_t product = Tile::ROWS * Tile::OUTPUTS / 32, basis = Tile::ROWS * 9 / 2;
  const int64_t stage = (product > basis ? product : basis) + 100;
  return (tiles + processors - 1) / processors * (channels / SLICE * stage + 3500);
}

}  // namespace

template <class X, class T>
void launch_hopper_forward(const Problem<X, T>& p, T* y, int64_t y_row, Stream stream) {
  const auto with_tile = [&](auto tile) {
    using Tile = decltype(tile);
    const Dim3 blocks{(p.rows + Tile::ROWS - 1) / Tile::ROWS,
                      (p.outputs + Tile::OUTPUTS - 1) / Tile::OUTPUTS};
    launch_dependent(hopper_forward_kernel<X, T, Tile>, blocks, Tile::THREADS, Tile::SHARED_BYTES, stream, p,
                     map_matrix(p.weight, p.outputs, p.depth(), p.weight_row, Tile::OUTPUTS), y, y_row);
  };
  const int processors = multiprocessors();
  const auto cost = [&](auto tile) {
    return estimate<decltype(tile)>(p.rows, p.channels, p.outputs, processors);
  };
  using Largest = Tile<3, 256>;
  using Wide = Tile<2, 256>;
  using Tall = Tile<3, 128>;
  using Smallest = Tile<2, 128>;
  const int64_t costs[] = {cost(Largest{}), cost(Wide{}), cost(Tall{}), cost(Smallest{})};
  const int64_t* least = costs;
  for (const int64_t& candidate : costs)
    if (candidate < *least) least = &candidate;
  switch (least - costs) {
    case 0:
      return with_tile(Largest{});
    case 1:
      return with_tile(Wide{});
    case 2:
      return with_tile(Tall{});
    default:
      return with_tile(Smallest{});
  }
}

template void launch_hopper_forward(const Problem<half_t, half_t>&, half_t*, int64_t, Stream);
template void launch_hopper_forward(const Problem<float, half_t>&, half_t*, int64_t, Stream);
template void launch_hopper_forward(const Problem<bfloat16_t, bfloat16_t>&, bfloat16_t*, int64_t, Stream);
template void launch_hopper_forward(const Problem<float, bfloat16_t>&, bfloat16_t*, int64_t, Stream);

}  // namespace vitkernels::kan_linear
