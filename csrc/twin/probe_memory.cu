#include "probe.h"
#include "vitkernels/device.h"

namespace vitkernels::probe {
namespace {

VK_KERNEL void write_shared_kernel(int64_t offset) {
  shared_memory()[offset] = 1;
}

VK_KERNEL void write_global_kernel(float* out, int64_t index) {
  out[index] = 1;
}

VK_KERNEL void read_shared_unwritten_kernel(float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  out[block_x() * block_dim_x() + thread_x()] = shared[thread_x()];
  shared[thread_x()] = 1;
}

VK_KERNEL void write_local_kernel(int* out, int index) {
  int local[4] = {1, 2, 3, 4};
  local[index] = 5;
  for (int i = 0; i < 4; ++i) out[i] = shfl(local[i], 0);
}

// Each lane writes N floats of shared memory and of `out`, `pitch` floats from the next lane's.
template <int N>
VK_KERNEL void write_apart_kernel(float* out, int pitch) {
  Vec<float, N> values;
  for (int i = 0; i < N; ++i) values[i] = 1;
  values.store(reinterpret_cast<float*>(shared_memory()) + lane_id() * pitch);
  values.store(out + lane_id() * pitch);
}

template <typename T, int N>
VK_KERNEL void copy_vectors_kernel(const T* in, T* out, int64_t vectors) {
  for (int64_t i = thread_x(); i < vectors; i += block_dim_x())
    Vec<T, N>::load(in + N * i).store(out + N * i);
}

constexpr int THREADS = 128;  // 16 bytes each: a row of 512 floats

VK_KERNEL void pipeline_kernel(const float* in, float* out, int steps, int valid, int flaw, int bytes) {
  float* stages[2] = {reinterpret_cast<float*>(shared_memory()),
                      reinterpret_cast<float*>(shared_memory()) + 4 * THREADS};
  const int mine = 4 * thread_x(), other = 4 * ((thread_x() + 40) % THREADS);
  const auto fetch = [&](int step) {
    if (step < steps) {
      float* const to = stages[step % 2] + mine;
      const float* const from = in + static_cast<int64_t>(step) * 4 * THREADS + mine;
      if (bytes == 16) {
        cp_async16(to, from, step < valid);
      } else {
        for (int i = 0; i < 4; i += 2) cp_async8(to + i, from + i, step < valid);
      }
    }
    cp_async_commit();
  };
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    fetch(step + 1);
    if (flaw == 0 || flaw == 3) cp_async_wait<1>();
    if (flaw == 2) cp_async_wait<2>();
    sync_block();
    const auto values = Vec<float, 4>::load(stages[step % 2] + other);
    values.store(out + static_cast<int64_t>(step) * 4 * THREADS + other);
    if (flaw != 3) sync_block();
  }
}

}  // namespace

void write_shared(int64_t shared_bytes, int64_t offset) {
  launch(write_shared_kernel, {}, 1, static_cast<size_t>(shared_bytes), nullptr, offset);
}
void write_global(float* out, int64_t index) {
  launch(write_global_kernel, {}, 1, 0, nullptr, out, index);
}
void read_shared_unwritten(float* out) {
  launch(read_shared_unwritten_kernel, {2}, 32, 32 * sizeof(float), nullptr, out);
}
void write_local(int* out, int index) {
  launch(write_local_kernel, {}, 32, 0, nullptr, out, index);
}
void write_apart(float* out, int width, int pitch) {
  const auto kernel = width == 1   ? write_apart_kernel<1>
                      : width == 2 ? write_apart_kernel<2>
                                   : write_apart_kernel<4>;
  launch(kernel, {}, 32, sizeof(float) * 32 * pitch, nullptr, out, pitch);
}
void copy_vectors_16(const uint16_t* in, uint16_t* out, int width, int64_t vectors) {
  const auto kernel = width == 1   ? copy_vectors_kernel<uint16_t, 1>
                      : width == 2 ? copy_vectors_kernel<uint16_t, 2>
                      : width == 4 ? copy_vectors_kernel<uint16_t, 4>
                                   : copy_vectors_kernel<uint16_t, 8>;
  launch(kernel, {}, 64, 0, nullptr, in, out, vectors);
}
void copy_vectors_64(const double* in, double* out, int width, int64_t vectors) {
  launch(width == 1 ? copy_vectors_kernel<double, 1> : copy_vectors_kernel<double, 2>, {}, 64, 0, nullptr, in,
         out, vectors);
}
void pipeline(const float* in, float* out, int steps, int valid, int flaw, int bytes) {
  launch(pipeline_kernel, {}, THREADS, 2 * THREADS * 16, nullptr, in, out, steps, valid, flaw, bytes);
}

}  // namespace vitkernels::probe
