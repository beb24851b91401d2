#include "probe.h"
#include "vitkernels/device.h"

namespace vitkernels::probe {
namespace {

VK_DEVICE uint32_t pair(uint16_t lo, uint16_t hi) {
  return lo | static_cast<uint32_t>(hi) << 16;
}

template <typename T>
VK_KERNEL void multiply_kernel(const uint16_t* a, const uint16_t* b, const float* c, float* d, int from) {
  uint16_t* shared_a = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* shared_b = shared_a + 16 * 16;
  const int lane = lane_id(), g = lane / 4, t = 2 * (lane % 4);
  for (int i = lane; i < 16 * 16; i += 32) shared_a[from == 2 ? i % 16 * 16 + i / 16 : i] = a[i];
  for (int i = lane; i < 16 * 8; i += 32) shared_b[from == 1 ? i % 8 * 16 + i / 8 : i] = b[i];
  sync_warp();

  uint32_t left[4], right[2];
  const int row = lane % 8, half = lane / 8 % 2, last = lane / 16;
  if (from == 0) {
    for (int i = 0; i < 4; ++i) {
      const uint16_t* at = a + (g + 8 * (i % 2)) * 16 + t + 8 * (i / 2);
      left[i] = pair(at[0], at[1]);
    }
    for (int i = 0; i < 2; ++i) right[i] = pair(b[(t + 8 * i) * 8 + g], b[(t + 1 + 8 * i) * 8 + g]);
  } else if (from == 1) {
    ldmatrix_x4(left, shared_a + (row + 8 * half) * 16 + 8 * last);
    ldmatrix_x2(right, shared_b + row * 16 + 8 * half);
  } else {
    ldmatrix_x4_trans(left, shared_a + (row + 8 * last) * 16 + 8 * half);
    ldmatrix_x2_trans(right, shared_b + (row + 8 * half) * 8);
  }
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(g + 8 * (i / 2)) * 8 + t + i % 2];
  mma_m16n8k16<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + t + i % 2] = sums[i];
}

VK_KERNEL void load_matrices_kernel(const uint16_t* in, uint32_t* out, int tiles, int transposed,
                                    int misaligned) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(shared_memory()) + misaligned;
  for (int i = lane_id(); i < 64 * tiles; i += 32) shared[i] = in[i];
  sync_warp();
  const uint16_t* row = shared + lane_id() % (8 * tiles) * 8;
  uint32_t four[4], two[2];
  if (tiles == 4) {
    transposed ? ldmatrix_x4_trans(four, row) : ldmatrix_x4(four, row);
  } else {
    transposed ? ldmatrix_x2_trans(two, row) : ldmatrix_x2(two, row);
  }
  for (int i = 0; i < tiles; ++i) out[lane_id() * tiles + i] = tiles == 4 ? four[i] : two[i];
}

VK_DEVICE int64_t global_thread() {
  return static_cast<int64_t>(block_x()) * block_dim_x() + thread_x();
}

template <typename T>
VK_KERNEL void round_kernel(const float* in, T* out, int64_t n) {
  const int64_t i = global_thread();
  if (i < n) out[i] = from_float<T>(in[i]);
}

template <typename T>
VK_KERNEL void widen_kernel(const T* in, float* out, int64_t n) {
  const int64_t i = global_thread();
  if (i < n) out[i] = to_float(in[i]);
}

template <typename T>
VK_KERNEL void pack_kernel(const float* lo, const float* hi, uint32_t* out, int64_t n) {
  const int64_t i = global_thread();
  if (i < n) out[i] = pack2<T>(lo[i], hi[i]);
}

VK_KERNEL void special_functions_kernel(const float* in, float* out, int64_t n) {
  const int64_t i = global_thread();
  if (i >= n) return;
  out[i] = exp2_fast(in[i]);
  out[n + i] = log2_fast(in[i]);
  out[2 * n + i] = exp_(in[i]);
  out[3 * n + i] = log_(in[i]);
}

constexpr int THREADS = 128;
Dim3 elements(int64_t n) {
  return {(n + THREADS - 1) / THREADS};
}

template <typename T>
void multiply(const uint16_t* a, const uint16_t* b, const float* c, float* d, int from) {
  launch(multiply_kernel<T>, {}, 32, (16 * 16 + 16 * 8) * sizeof(uint16_t), nullptr, a, b, c, d, from);
}
template <typename T>
void round_all(const float* in, uint16_t* out, int64_t n) {
  launch(round_kernel<T>, elements(n), THREADS, 0, nullptr, in, reinterpret_cast<T*>(out), n);
}
template <typename T>
void widen_all(const uint16_t* in, float* out, int64_t n) {
  launch(widen_kernel<T>, elements(n), THREADS, 0, nullptr, reinterpret_cast<const T*>(in), out, n);
}

}  // namespace

void multiply_half(const uint16_t* a, const uint16_t* b, const float* c, float* d, int from) {
  multiply<half_t>(a, b, c, d, from);
}
void multiply_bfloat16(const uint16_t* a, const uint16_t* b, const float* c, float* d, int from) {
  multiply<bfloat16_t>(a, b, c, d, from);
}
void load_matrices(const uint16_t* in, uint32_t* out, int tiles, int transposed, int misaligned) {
  launch(load_matrices_kernel, {}, 32, static_cast<size_t>(tiles) * 128 + 16, nullptr, in, out, tiles,
         transposed, misaligned);
}
void round_half(const float* in, uint16_t* out, int64_t n) {
  round_all<half_t>(in, out, n);
}
void round_bfloat16(const float* in, uint16_t* out, int64_t n) {
  round_all<bfloat16_t>(in, out, n);
}
void widen_half(const uint16_t* in, float* out, int64_t n) {
  widen_all<half_t>(in, out, n);
}
void widen_bfloat16(const uint16_t* in, float* out, int64_t n) {
  widen_all<bfloat16_t>(in, out, n);
}
void pack_half(const float* lo, const float* hi, uint32_t* out, int64_t n) {
  launch(pack_kernel<half_t>, elements(n), THREADS, 0, nullptr, lo, hi, out, n);
}
void pack_bfloat16(const float* lo, const float* hi, uint32_t* out, int64_t n) {
  launch(pack_kernel<bfloat16_t>, elements(n), THREADS, 0, nullptr, lo, hi, out, n);
}
void special_functions(const float* in, float* out, int64_t n) {
  launch(special_functions_kernel, elements(n), THREADS, 0, nullptr, in, out, n);
}

}  // namespace vitkernels::probe
