#include "probe.h"
#include "vitkernels/device.h"

namespace vitkernels::probe {
namespace {

// Two rounds through one buffer: each thread reads what a thread of the next warp wrote.
VK_KERNEL void exchange_in_block_kernel(const float* in, float* out, int missing) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int threads = block_dim_x(), thread = thread_x();
  const int64_t at = static_cast<int64_t>(block_x()) * threads + thread;
  float value = in[at];
  for (int round = 0; round < 2; ++round) {
    shared[thread] = value;
    if (missing != 1) sync_block();
    value = 2 * value + shared[(thread + 33) % threads];
    if (missing != 2) sync_block();
  }
  out[at] = value;
}

VK_KERNEL void exchange_in_warp_kernel(const float* in, float* out, int missing) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int64_t at = static_cast<int64_t>(block_x()) * 32 + lane_id();
  float value = in[at];
  for (int round = 0; round < 2; ++round) {
    shared[lane_id()] = value;
    if (missing == 3) {
      shfl(0, 0);  // brings the lanes together, and that is all
    } else if (missing != 1) {
      sync_warp();
    }
    value = 2 * value + shared[(lane_id() + 1) % 32];
    if (missing != 2) sync_warp();
  }
  out[at] = value;
}

template <typename T>
VK_KERNEL void collectives_kernel(const T* in, T* out, int from, int mask, int delta) {
  T* scratch = reinterpret_cast<T*>(shared_memory());
  const T value = in[thread_x()];
  const T results[9] = {shfl(value, (lane_id() + from) % 32),
                        shfl_xor(value, mask),
                        shfl_xor(value, mask, 8),
                        shfl_down(value, delta),
                        warp_sum(value),
                        warp_sum<8>(value),
                        warp_max<16>(value),
                        block_sum(value, scratch),
                        block_max(value, scratch)};
  for (int i = 0; i < 9; ++i) out[i * block_dim_x() + thread_x()] = results[i];
}

template <typename T>
void collectives(const T* in, T* out, int from, int mask, int delta) {
  launch(collectives_kernel<T>, {}, 64, 2 * sizeof(T), nullptr, in, out, from, mask, delta);
}

VK_KERNEL void diverge_kernel(int* out, int how) {
  const bool first = lane_id() < 16;
  int value = thread_x();
  if (how == SHUFFLE_AND_BARRIER) {
    if (first) {
      value = shfl(value, 0);
    } else {
      sync_block();
    }
  } else if (how == SHUFFLE_AND_EXIT) {
    if (!first) return;
    value = shfl(value, 0);
  } else if (how == TWO_COLLECTIVES) {
    value = first ? shfl(value, 0) : shfl_down(value, 1);
  } else {
    if (warp_id() == 0 && !first) return;
    sync_block();
  }
  out[thread_x()] = value;
}

VK_KERNEL void count_positive_kernel(const float* in, int* count, int64_t n) {
  const int64_t at = static_cast<int64_t>(block_x()) * block_dim_x() + thread_x();
  if (at < n && in[at] > 0) atomic_add(count, 1);
}

VK_KERNEL void write_from_blocks_kernel(int* out, int apart) {
  out[block_x() * apart + thread_x()] = block_x();
}

VK_KERNEL void double_kernel(const float* in, float* out) {
  admit_launch();
  out[thread_x()] = 2 * in[thread_x()];
}
VK_KERNEL void reverse_kernel(const float* in, float* out) {
  wait_for_launch();
  out[thread_x()] = in[block_dim_x() - 1 - thread_x()];
}

VK_KERNEL void positions_kernel(int* out, int rows, int columns) {
  const int64_t block = (static_cast<int64_t>(block_z()) * rows + block_y()) * columns + block_x();
  int* mine = out + (block * block_dim_x() + thread_x()) * 6;
  const int values[6] = {block_x(), block_y(), block_z(), lane_id(), warp_id(), grid_x()};
  for (int i = 0; i < 6; ++i) mine[i] = values[i];
}

VK_KERNEL void nothing_kernel() {}

}  // namespace

void exchange_in_block(const float* in, float* out, int blocks, int threads, int missing) {
  launch(exchange_in_block_kernel, {blocks}, threads, sizeof(float) * threads, nullptr, in, out, missing);
}
void exchange_in_warp(const float* in, float* out, int blocks, int missing) {
  launch(exchange_in_warp_kernel, {blocks}, 32, sizeof(float) * 32, nullptr, in, out, missing);
}
void collectives_f32(const float* in, float* out, int from, int mask, int delta) {
  collectives(in, out, from, mask, delta);
}
void collectives_f64(const double* in, double* out, int from, int mask, int delta) {
  collectives(in, out, from, mask, delta);
}
void collectives_i32(const int32_t* in, int32_t* out, int from, int mask, int delta) {
  collectives(in, out, from, mask, delta);
}
void collectives_u32(const uint32_t* in, uint32_t* out, int from, int mask, int delta) {
  collectives(in, out, from, mask, delta);
}
void diverge(int* out, int threads, int how) {
  launch(diverge_kernel, {}, threads, 0, nullptr, out, how);
}
void count_positive(const float* in, int* count, int64_t n) {
  launch(count_positive_kernel, {(n + 63) / 64}, 64, 0, nullptr, in, count, n);
}
void dependent_launch(const float* in, float* between, float* out, int threads) {
  launch(double_kernel, {}, threads, 0, nullptr, in, between);
  launch_dependent(reverse_kernel, {}, threads, 0, nullptr, between, out);
}
void write_from_blocks(int* out, int blocks, int threads, int apart) {
  launch(write_from_blocks_kernel, {blocks}, threads, 0, nullptr, out, apart);
}
void positions(int* out, int64_t x, int64_t y, int64_t z, int threads) {
  launch(positions_kernel, {x, y, z}, threads, 0, nullptr, out, static_cast<int>(y), static_cast<int>(x));
}
void launch_shape(int64_t x, int64_t y, int64_t z, int threads, int64_t shared_bytes) {
  launch(nothing_kernel, {x, y, z}, threads, static_cast<size_t>(shared_bytes), nullptr);
}

}  // namespace vitkernels::probe
