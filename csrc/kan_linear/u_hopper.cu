// The gradient of u on Hopper: dPhi = dY W of 192 rows and 32 channels by asynchronous products of
// warpgroups, contracted with phi' where it lies, in the registers of the four lanes that share a row of it.
//
// For J outputs the product is 24 J cycles of the tensor cores at their peak, and reads 0.56 J KB of dY and W
// from L2, 36 bytes a cycle. The contraction after it, nine instructions an element of dPhi, is 3500 issue
// slots of each of the four schedulers.
#include "hopper.h"
#include "vitkernels/matrix_copy.h"

namespace vitkernels::kan_linear {
namespace {

struct UTile {
  static constexpr int THREADS = 2 * U_ROWS;
  static constexpr int CHANNELS = 32, COLUMNS = CHANNELS * CENTRES;
  static constexpr int DEPTH = 64;  // outputs of a stage
  static constexpr int STAGES = 3;
  static constexpr int GRAD_BYTES = U_ROWS * STAGE_BYTES, BLOCK_BYTES = DEPTH * STAGE_BYTES;
  static constexpr int BYTES = GRAD_BYTES + COLUMNS / 64 * BLOCK_BYTES;  // of a stage
  // Between two rows of u and of its gradient: eight rows of four channels meet 32 banks.
  static constexpr int PITCH = CHANNELS + 4;
  static constexpr size_t SHARED_BYTES = STAGES * BYTES +
                                         sizeof(float) * (U_ROWS * PITCH + 2 * CENTRES + 2 * CHANNELS) +
                                         sizeof(Arrival) * STAGES;
};

#if defined(VK_WGMMA)
// phi tanh / 4 at two neighbouring centres.
struct Slope {
  const float* tables;
  bool narrow;

  // u of a channel as contract() wants it: the decay where the grid is narrow, else the exponent.
  VK_DEVICE float prepare(float exponent) const {
    return narrow ? exp2_fast(at_most(exponent, WIDEST_U)) : exponent;
  }
  template <bool NARROW>
  static VK_DEVICE float contract(float u, Vec<float, 2> centres, float first, float second) {
    if constexpr (NARROW) {
      const float a = u * centres[0] + 1.0f, b = u * centres[1] + 1.0f;
      const float both = reciprocal_fast(a * b), q = both * b, r = both * a;
      return first * ((q - q * q) * (1.0f - 2.0f * q)) + second * ((r - r * r) * (1.0f - 2.0f * r));
    } else {
      return first * of(u - centres[0]) + second * of(u - centres[1]);
    }
  }
  static VK_DEVICE float of(float distance) {
    const float e = exp2_fast(distance < 0.0f ? distance : -distance), q = reciprocal_fast(1.0f + e);
    const float slope = e * q * q * (1.0f - e) * q;
    return distance < 0.0f ? -slope : slope;
  }
};
#endif

template <class X, class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(UTile::THREADS, 1)
    hopper_u_kernel(Problem<X, T> p, const VK_GRID_CONSTANT MatrixMap grad_map,
                    const VK_GRID_CONSTANT MatrixMap weight_map, float* grad_u, float* partial_scale,
                    float* partial_shift, int slices) {
#if defined(VK_WGMMA)
  constexpr int CHANNELS = UTile::CHANNELS, COLUMNS = UTile::COLUMNS, DEPTH = UTile::DEPTH;
  constexpr int THREADS = UTile::THREADS, PITCH = UTile::PITCH;
  constexpr int GRAD_BYTES = UTile::GRAD_BYTES, BLOCK_BYTES = UTile::BLOCK_BYTES;
  char* const ring = shared_memory();
  float* const staged = reinterpret_cast<float*>(ring + UTile::STAGES * UTile::BYTES);
  float* const tables = staged + U_ROWS * PITCH;
  float *const scale = tables + 2 * CENTRES, *const shift = scale + CHANNELS;
  const int64_t tile = block_x() / slices, first_row = tile * U_ROWS;
  const int first_channel = block_x() % slices * CHANNELS;
  const int channels = p.channels - first_channel < CHANNELS ? p.channels - first_channel : CHANNELS;
  const int rows = p.rows - first_row < U_ROWS ? static_cast<int>(p.rows - first_row) : U_ROWS;
  const int stages = (p.outputs + DEPTH - 1) / DEPTH;

  Arrival* const arrivals = reinterpret_cast<Arrival*>(shift + CHANNELS);
  // Zeros beyond the last row, output or channel.
  const auto fetch = [&](int stage) {
    if (stage >= stages || thread_x() != 0) return;
    const int place = stage % UTile::STAGES;
    char* const to = ring + place * UTile::BYTES;
    expect_arrival(arrivals + place, UTile::BYTES);
    copy_tile(to, grad_map, stage * DEPTH, static_cast<int>(first_row), arrivals + place);
    VK_UNROLL
    for (int i = 0; i < COLUMNS / 64; ++i)
      copy_tile(to + GRAD_BYTES + i * BLOCK_BYTES, weight_map, first_channel * CENTRES + 64 * i,
                stage * DEPTH, arrivals + place);
  };
  if (thread_x() == 0) prepare_arrivals(arrivals, UTile::STAGES);
  VK_UNROLL
  for (int stage = 0; stage < UTile::STAGES; ++stage) fetch(stage);

  const Slope slope{tables, prepare_centres(tables, p)};
  if (thread_x() < CHANNELS) {
    const int mine = first_channel + (thread_x() < channels ? thread_x() : 0);
    scale[thread_x()] = p.ln_weight[mine] * p.exponent_unit();
    shift[thread_x()] = p.ln_bias[mine] * p.exponent_unit();
  }
  sync_block();

  // A thread prepares u of half the channels of a row. Rows and channels beyond the last are the likeness of
  // others.
  {
    const int r = thread_x() / 2, half = thread_x() % 2 * (CHANNELS / 2);
    const int64_t row = first_row + (r < rows ? r : rows - 1);
    const float rstd = p.rstd[row], centre = -p.mean[row] * rstd;
    const X* const x = p.x + row * p.x_row + first_channel;
    VK_UNROLL
    for (int c = half; c < half + CHANNELS / 2; c += 4) {
      const FourNorms norms{Vec<float, 4>::load(scale + c), Vec<float, 4>::load(shift + c)};
      auto u = exponents_of<X>(load_four(x + (c < channels ? c : 0)), rstd, centre, norms);
      VK_UNROLL
      for (int e = 0; e < 4; ++e) u[e] = slope.prepare(u[e]);
      u.store(staged + r * PITCH + c);
    }
  }

  float sums[COLUMNS / 2];
  VK_UNROLL
  for (int i = 0; i < COLUMNS / 2; ++i) sums[i] = 0.0f;
  hold(sums);
  VK_NO_UNROLL
  for (int stage = 0; stage < stages; ++stage) {
    wait_arrival(arrivals + stage % UTile::STAGES, stage / UTile::STAGES);
    char* const place = ring + stage % UTile::STAGES * UTile::BYTES;
    const Operand<STAGE_BYTES, Major::FEATURES_SIDE_BY_SIDE> left(place + warp_id() / 4 * 64 * STAGE_BYTES);
    const Operand<STAGE_BYTES, Major::BY_FEATURES> right(place + GRAD_BYTES, BLOCK_BYTES);
    wgmma_fence();
    VK_UNROLL
    for (int k = 0; k < DEPTH; k += 16)
      wgmma<T, COLUMNS>(sums, left.advance(2 * k), right.advance(k * STAGE_BYTES));
    wgmma_commit();
    // While this product runs: of every warpgroup the one before is done, its place is free.
    wgmma_wait<1>();
    sync_block();
    if (stage > 0) fetch(stage - 1 + UTile::STAGES);
  }
  wgmma_wait<0>();
  hold(sums);

  // Four channels of a row at a time: each lane has two centres of each of them, and is left with the sum of
  // one of them.
  const int g = lane_id() / 4, t = lane_id() % 4;
  const float factor = -8.0f * static_cast<float>(p.inverse);
  const auto contract = [&](auto narrow) {
    const auto centres = Vec<float, 2>::load(tables + (narrow ? 0 : CENTRES) + 2 * t);
    VK_UNROLL
    for (int low = 0; low < 2; ++low) {
      float* const row = staged + (warp_id() * 16 + g + 8 * low) * PITCH;
      VK_UNROLL
      for (int c = 0; c < CHANNELS; c += 4) {
        const auto u = Vec<float, 4>::load(row + c);
        float part[4];
        VK_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int at = 4 * (c + e) + 2 * low;
          part[e] = Slope::contract<decltype(narrow)::value>(u[e], centres, sums[at], sums[at + 1]);
        }
        const bool odd = t % 2 != 0, high = t / 2 != 0;
        const float even_pair = (odd ? part[1] : part[0]) + shfl_xor(odd ? part[0] : part[1], 1);
        const float odd_pair = (odd ? part[3] : part[2]) + shfl_xor(odd ? part[2] : part[3], 1);
        const float mine = (high ? odd_pair : even_pair) + shfl_xor(high ? even_pair : odd_pair, 2);
        sync_warp();  // u has been read
        row[c + t] = factor * mine;
      }
    }
  };
  if (slope.narrow) {
    contract(std::true_type{});
  } else {
    contract(std::false_type{});
  }
  sync_block();

  // By rows, a lane for each channel, so that rows are read and written whole.
  float of_scale = 0.0f, of_shift = 0.0f;
  if (lane_id() < channels) {
    VK_UNROLL_4
    for (int r = warp_id(); r < rows; r += THREADS / 32) {
      const float gradient = staged[r * PITCH + lane_id()];
      of_scale += gradient * p.normed(first_row + r, first_channel + lane_id());
      of_shift += gradient;
      if (grad_u != nullptr) grad_u[(first_row + r) * p.channels + first_channel + lane_id()] = gradient;
    }
  }
  float* const of_warps = reinterpret_cast<float*>(ring);
  of_warps[thread_x()] = of_scale;
  of_warps[THREADS + thread_x()] = of_shift;
  sync_block();
  if (thread_x() >= channels) return;
  for (int warp = 1; warp < THREADS / 32; ++warp) {
    of_scale += of_warps[32 * warp + thread_x()];
    of_shift += of_warps[THREADS + 32 * warp + thread_x()];
  }
  partial_scale[tile * p.channels + first_channel + thread_x()] = of_scale;
  partial_shift[tile * p.channels + first_channel + thread_x()] = of_shift;
#endif
}

}  // namespace

template <class X, class T>
void launch_hopper_u(const Problem<X, T>& p, float* grad_u, float* scale, float* shift, Stream stream) {
  const int slices = (p.channels + UTile::CHANNELS - 1) / UTile::CHANNELS;
  launch(hopper_u_kernel<X, T>, Dim3{(p.rows + U_ROWS - 1) / U_ROWS * slices}, UTile::THREADS,
         UTile::SHARED_BYTES, stream, p, map_matrix(p.grad_y, p.rows, p.outputs, p.grad_row, U_ROWS),
         map_matrix(p.weight, p.outputs, p.depth(), p.weight_row, UTile::DEPTH), grad_u, scale, shift,
         slices);
}

template void launch_hopper_u(const Problem<half_t, half_t>&, float*, float*, float*, Stream);
template void launch_hopper_u(const Problem<float, half_t>&, float*, float*, float*, Stream);
template void launch_hopper_u(const Problem<bfloat16_t, bfloat16_t>&, float*, float*, float*, Stream);
template void launch_hopper_u(const Problem<float, bfloat16_t>&, float*, float*, float*, Stream);

}  // namespace vitkernels::kan_linear
