// The layer's nvcc side: every name is one instruction, or a handful. Included through device.h.
#pragma once
#include <cuda_runtime.h>

#include "vitkernels/dtypes.h"

namespace vitkernels {

VK_DEVICE int thread_x() {
  return static_cast<int>(threadIdx.x);
}
VK_DEVICE int block_dim_x() {
  return static_cast<int>(blockDim.x);
}
VK_DEVICE int block_x() {
  return static_cast<int>(blockIdx.x);
}
VK_DEVICE int block_y() {
  return static_cast<int>(blockIdx.y);
}
VK_DEVICE int block_z() {
  return static_cast<int>(blockIdx.z);
}
VK_DEVICE int grid_x() {
  return static_cast<int>(gridDim.x);
}
VK_DEVICE int lane_id() {
  return static_cast<int>(threadIdx.x & 31);
}
VK_DEVICE int warp_id() {
  return static_cast<int>(threadIdx.x >> 5);
}

VK_DEVICE char* shared_memory() {
  // wgmma wants its matrices so; nothing else may rely on more than 16.
  extern __shared__ __align__(1024) char vitkernels_shared[];
  return vitkernels_shared;
}

// From here on the compiler knows nothing about x: what follows from it is computed again where it is needed,
// instead of being held in registers from before.
VK_DEVICE void forget(int& x) {
  asm volatile("" : "+r"(x));
}
template <class T>
VK_DEVICE void forget(T*& x) {
  asm volatile("" : "+l"(x));
}

VK_DEVICE void sync_block() {
  __syncthreads();
}
VK_DEVICE void sync_warp() {
  __syncwarp();
}

// Programmatic dependent launch (sm_90 and later; elsewhere a launch begins when the one before has ended):
// a kernel started by launch_dependent() may run once every block of the launch before it has called
// admit_launch() or ended, and sees what that one has written after wait_for_launch().
VK_DEVICE void admit_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
VK_DEVICE void wait_for_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

constexpr unsigned FULL_WARP = 0xffffffffu;

template <typename T>
VK_DEVICE T shfl(T value, int lane) {
  return __shfl_sync(FULL_WARP, value, lane);
}
template <typename T>
VK_DEVICE T shfl_xor(T value, int mask, int width = 32) {
  return __shfl_xor_sync(FULL_WARP, value, mask, width);
}
template <typename T>
VK_DEVICE T shfl_down(T value, int delta) {
  return __shfl_down_sync(FULL_WARP, value, delta);
}

template <typename T>
VK_DEVICE T atomic_add(T* target, T value) {
  static_assert(std::is_integral_v<T>, "float atomics would make the result depend on the schedule");
  return atomicAdd(target, value);
}

template <typename T, int N>
VK_DEVICE Vec<T, N> Vec<T, N>::load(const T* source) {
  static_assert(sizeof(Vec) <= 16);
  Vec result;
  if constexpr (sizeof(Vec) == 16) {
    const uint4 raw = *reinterpret_cast<const uint4*>(source);
    memcpy(&result, &raw, sizeof(raw));
  } else if constexpr (sizeof(Vec) == 8) {
    const uint2 raw = *reinterpret_cast<const uint2*>(source);
    memcpy(&result, &raw, sizeof(raw));
  } else if constexpr (sizeof(Vec) == 4) {
    const uint32_t raw = *reinterpret_cast<const uint32_t*>(source);
    memcpy(&result, &raw, sizeof(raw));
  } else {
    result.data[0] = *source;
  }
  return result;
}

template <typename T, int N>
VK_DEVICE void Vec<T, N>::store(T* target) const {
  if constexpr (sizeof(Vec) == 16) {
    uint4 raw;
    memcpy(&raw, this, sizeof(raw));
    // Made anew: nvcc would take a vector that was put together by elements apart again, into four stores.
    *reinterpret_cast<uint4*>(target) = make_uint4(raw.x, raw.y, raw.z, raw.w);
  } else if constexpr (sizeof(Vec) == 8) {
    uint2 raw;
    memcpy(&raw, this, sizeof(raw));
    *reinterpret_cast<uint2*>(target) = raw;
  } else if constexpr (sizeof(Vec) == 4) {
    uint32_t raw;
    memcpy(&raw, this, sizeof(raw));
    *reinterpret_cast<uint32_t*>(target) = raw;
  } else {
    *target = data[0];
  }
}

// The larger of x and a maximum so far, which is no NaN; a NaN x does not count.
VK_DEVICE float larger(float x, float maximum) {
  return fmaxf(x, maximum);
}
VK_DEVICE double larger(double x, double maximum) {
  return fmax(x, maximum);
}

// The lesser of x and a bound, which is no NaN; a NaN x stays one.
VK_DEVICE float at_most(float x, float bound) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
}

// ---- special functions: the float ones flush subnormals ----

VK_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VK_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// At most an ulp off.
VK_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VK_DEVICE float exp_(float x) {
  return expf(x);
}
VK_DEVICE double exp_(double x) {
  return exp(x);
}
VK_DEVICE float log_(float x) {
  return logf(x);
}
VK_DEVICE double log_(double x) {
  return log(x);
}

// ---- matrix tiles ----

// d += a b for a 16x16 tile a (rows), a 16x8 tile b (columns), f32 sums. With g = lane / 4, t = lane % 4:
//   a[0], a[1]  rows g, g + 8, columns 2t, 2t + 1;   a[2], a[3]  the same rows, columns + 8
//   b[0], b[1]  rows 2t, 2t + 1 and + 8, column g
//   d[0..1], d[2..3]  rows g, g + 8, columns 2t, 2t + 1
template <typename T>
VK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, half_t> || std::is_same_v<T, bfloat16_t>);
  if constexpr (std::is_same_v<T, half_t>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

VK_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 8x8 tiles of 16-bit values; lane i gives the address of row i % 8 of tile i / 8 (16-byte aligned) and
// receives, of every tile, row lane / 4, columns 2 (lane % 4) and the next (_trans: of the transposed tile).
// The two-tile forms read the addresses of lanes 0-15.
VK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
VK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
VK_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
VK_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// ---- asynchronous copies ----

// 16 bytes, both sides aligned to 16; zeros when not valid, and gmem is then never read.
VK_DEVICE void cp_async16(void* smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(gmem),
               "r"(valid ? 16 : 0)
               : "memory");
}
// The same of 8 bytes, through L1.
VK_DEVICE void cp_async8(void* smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(smem)), "l"(gmem),
               "r"(valid ? 8 : 0)
               : "memory");
}
VK_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most N of this thread's newest groups are in flight; other threads need a barrier after it.
template <int N>
VK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace vitkernels
