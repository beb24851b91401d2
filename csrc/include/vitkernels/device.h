// The thin layer between kernels and the machine. A kernel written with these names alone compiles
//   * with nvcc, each name becoming the bare instruction (sm_80 and later), and
//   * with g++ -x c++ -DVITKERNELS_HOST_TWIN, each CUDA thread becoming a fiber on the host (host_twin.h).
//
// Blocks are one-dimensional. Shared memory is dynamic only: static __shared__ would escape the twin's
// poisoning. Float atomics are missing on purpose: every result has a fixed summation order.
#pragma once

#if defined(VITKERNELS_HOST_TWIN)
#define VK_HOST_DEVICE inline
#define VK_DEVICE inline
#define VK_KERNEL
#define VK_LAUNCH_BOUNDS(threads, min_blocks)
#define VK_UNROLL
#define VK_UNROLL_4
#else
#define VK_HOST_DEVICE __host__ __device__ __forceinline__
#define VK_DEVICE __device__ __forceinline__
#define VK_KERNEL __global__
#define VK_LAUNCH_BOUNDS(threads, min_blocks) __launch_bounds__(threads, min_blocks)
#define VK_UNROLL _Pragma("unroll")
// Four loads in flight in a loop whose length is not known.
#define VK_UNROLL_4 _Pragma("unroll 4")
#endif
// Unrolled copies hold a register per address and gain nothing: each visit has its own loads in flight.
#define VK_NO_UNROLL _Pragma("unroll 1")

// clang-format off
#include "vitkernels/dtypes.h"
#if defined(VITKERNELS_HOST_TWIN)
#include "vitkernels/host_twin.h"
#else
#include "vitkernels/cuda_instructions.h"
#endif
#include "vitkernels/reduce.h"
#include "vitkernels/launch.h"
// clang-format on
