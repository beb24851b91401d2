#include "probe.h"
#include "vitkernels/device.h"
#include "vitkernels/matrix_copy.h"

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

VK_KERNEL void flawed_product_kernel(int flaw) {
#if defined(VK_WGMMA)
  using Rows = Operand<128, Major::FEATURES_SIDE_BY_SIDE>;
  float* const words = reinterpret_cast<float*>(shared_memory());  // of 64 rows of a, and as many of b
  for (int i = thread_x(); i < 2 * 64 * 32; i += 128) words[i] = 0.0f;
  if (flaw != 2) fence_async_proxy();
  sync_block();
  float sums[32] = {};
  hold(sums);
  if (flaw != 3) wgmma_fence();
  wgmma<half_t, 64>(sums, Rows(words), Rows(words + 64 * 32));
  wgmma_commit();
  if (flaw == 4) hold(sums);
  if (flaw != 1 && flaw != 5) wgmma_wait<0>();
  sync_block();
  if (thread_x() == 127) words[0] = 1.0f;  // of another warp
  if (flaw == 5) sync_block();
  wgmma_wait<0>();
  hold(sums);
#else
  (void)flaw;
#endif
}

// d = a b by a warpgroup, a [64, BYTES / 2], b [BYTES / 2, N], both row-major.
VK_KERNEL void copy_tile_kernel(const VK_GRID_CONSTANT MatrixMap map, uint16_t* out, int tile_rows,
                                int column, int row, int bytes, int use) {
#if defined(VK_WGMMA)
  char* const tile = shared_memory();
  Arrival* const arrival = reinterpret_cast<Arrival*>(tile + tile_rows * 128);
  if (thread_x() == 0) {
    prepare_arrivals(arrival, 1);
    expect_arrival(arrival, bytes);
    copy_tile(tile, map, column, row, arrival);
  }
  sync_block();
  if (use != -2) wait_arrival(arrival, use);
  for (int i = thread_x(); i < tile_rows * COPIED_COLUMNS; i += 32) {
    const int r = i / COPIED_COLUMNS, c = i % COPIED_COLUMNS;
    out[i] = reinterpret_cast<const uint16_t*>(tile + r * 128 + chunk_of<128>(r, c / 8) * 16)[c % 8];
  }
#else
  (void)map, (void)out, (void)tile_rows, (void)column, (void)row, (void)bytes, (void)use;
#endif
}
template <typename T, int N, int BYTES, Major MAJOR>
VK_KERNEL void multiply_group_kernel(const uint16_t* a, const uint16_t* b, float* d, int from_registers) {
#if defined(VK_WGMMA)
  constexpr int DEPTH = BYTES / 2, ATOM = DEPTH * BYTES;  // ATOM: DEPTH rows or columns, all features
  constexpr int STEP = MAJOR == Major::BY_FEATURES ? 16 * BYTES : 32;
  char* left = shared_memory();
  char* right = left + 64 * BYTES;
  const auto put = [](char* matrix, int i, int k, uint16_t value) {
    const int row = MAJOR == Major::BY_FEATURES ? i / DEPTH * DEPTH + k : i;
    const int column = MAJOR == Major::BY_FEATURES ? i % DEPTH : k;
    reinterpret_cast<uint16_t*>(matrix + row * BYTES + chunk_of<BYTES>(row, column / 8) * 16)[column % 8] =
        value;
  };
  for (int i = thread_x(); i < 64 * DEPTH; i += 128) put(left, i / DEPTH, i % DEPTH, a[i]);
  for (int i = thread_x(); i < N * DEPTH; i += 128) put(right, i % N, i / N, b[i]);
  fence_async_proxy();
  sync_block();

  const int g = lane_id() / 4, t = lane_id() % 4, row = warp_id() * 16 + g;
  float sums[N / 2];
  for (float& sum : sums) sum = 0.0f;
  uint32_t registers[DEPTH / 16][4];
  VK_UNROLL
  for (int k = 0; k < DEPTH; k += 16) {
    VK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint16_t* at = a + (row + 8 * (i % 2)) * DEPTH + k + 2 * t + 8 * (i / 2);
      registers[k / 16][i] = pair(at[0], at[1]);
    }
  }
  const Operand<BYTES, MAJOR> on_left(left, ATOM), on_right(right, ATOM);
  hold(sums);
  wgmma_fence();
  VK_UNROLL
  for (int k = 0; k < DEPTH / 16; ++k) {
    if (from_registers) {
      wgmma<T, N>(sums, registers[k], on_right.advance(k * STEP));
    } else {
      wgmma<T, N>(sums, on_left.advance(k * STEP), on_right.advance(k * STEP));
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(sums);
  VK_UNROLL
  for (int i = 0; i < N / 2; ++i) d[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + 2 * t + i % 2] = sums[i];
#else
  (void)a, (void)b, (void)d, (void)from_registers;
#endif
}

template <typename T>
void multiply_group(const uint16_t* a, const uint16_t* b, float* d, int n, int bytes, int by_features,
                    int from_registers) {
  const auto run = [&](auto kernel) {
    launch(kernel, {}, 128, static_cast<size_t>(64 + n) * bytes, nullptr, a, b, d, from_registers);
  };
  const auto by_width = [&](auto width) {
    constexpr int N = decltype(width)::value;
    if (bytes == 64)
      by_features ? run(multiply_group_kernel<T, N, 64, Major::BY_FEATURES>)
                  : run(multiply_group_kernel<T, N, 64, Major::FEATURES_SIDE_BY_SIDE>);
    else
      by_features ? run(multiply_group_kernel<T, N, 128, Major::BY_FEATURES>)
                  : run(multiply_group_kernel<T, N, 128, Major::FEATURES_SIDE_BY_SIDE>);
  };
  if (n == 32 && bytes == 64) by_width(std::integral_constant<int, 32>{});
  if (n == 64) by_width(std::integral_constant<int, 64>{});
  if (n == 128) by_width(std::integral_constant<int, 128>{});
  if (n == 256) by_width(std::integral_constant<int, 256>{});
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
  out[4 * n + i] = reciprocal_fast(in[i]);
  out[5 * n + i] = at_most(in[i], 2.0f);
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
void flawed_product(int flaw) {
  launch(flawed_product_kernel, {}, 128, 2 * 64 * 128, nullptr, flaw);
}
void copy_matrix_tile(const uint16_t* matrix, uint16_t* out, int rows, int columns, int stride, int tile_rows,
                      int column, int row, int bytes, int use) {
  launch(copy_tile_kernel, {}, 32, static_cast<size_t>(tile_rows) * 128 + sizeof(Arrival), nullptr,
         map_matrix(matrix, rows, columns, stride, tile_rows), out, tile_rows, column, row, bytes, use);
}

void multiply_group_half(const uint16_t* a, const uint16_t* b, float* d, int n, int bytes, int by_features,
                         int from_registers) {
  multiply_group<half_t>(a, b, d, n, bytes, by_features, from_registers);
}
void multiply_group_bfloat16(const uint16_t* a, const uint16_t* b, float* d, int n, int bytes,
                             int by_features, int from_registers) {
  multiply_group<bfloat16_t>(a, b, d, n, bytes, by_features, from_registers);
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
