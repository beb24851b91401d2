// Choosing and launching a kernel, the same call for the device and the twin. Included through device.h.
#pragma once
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "vitkernels/dtypes.h"
#include "vitkernels/params.h"

namespace vitkernels {

// run(T{}), T being the type of a dtype's elements.
template <class Run>
auto with_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::f64:
      return run(double{});
    case DType::f32:
      return run(float{});
    case DType::f16:
      return run(half_t{});
    case DType::bf16:
      return run(bfloat16_t{});
  }
  throw std::runtime_error("unknown dtype");
}

// run(T{}, U{}) with the types of both, where `other` is `dtype`, or float32 beside half precision.
template <class Run>
auto with_dtypes(DType dtype, DType other, Run run) {
  return with_dtype(dtype, [&](auto element) {
    if constexpr (sizeof(element) < sizeof(float))
      if (other == DType::f32) return run(element, float{});
    return run(element, element);
  });
}

struct Dim3 {
  int64_t x = 1;
  int64_t y = 1;
  int64_t z = 1;
};

inline std::string describe_launch(const Dim3& grid, int threads, size_t shared_bytes) {
  return "grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) +
         "), " + std::to_string(threads) + " threads, " + std::to_string(shared_bytes) +
         " bytes of shared memory";
}

// The most that any block can have (sm_90, sm_100); the driver refuses what the device at hand has not.
constexpr size_t MAX_SHARED_BYTES = 227 * 1024;

// Whether launch_dependent() makes use of programmatic dependent launch.
constexpr bool START_EARLY = true;

// What a block of the current device can have.
inline size_t shared_limit() {
#if defined(VITKERNELS_HOST_TWIN)
  return MAX_SHARED_BYTES;
#else
  int device = 0, limit = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
  return known ? static_cast<size_t>(limit) : 48 * 1024;
#endif
}

// 64-bit sizes would wrap silently in CUDA's 32-bit dim3, so they are checked here and not left to the
// driver.
inline void check_launch(const Dim3& grid, int threads, size_t shared_bytes) {
  const bool fits = grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
                    grid.z <= 65535 && threads >= 1 && threads <= 1024 && shared_bytes <= MAX_SHARED_BYTES;
  if (!fits)
    throw std::runtime_error("kernel launch refused: " + describe_launch(grid, threads, shared_bytes) +
                             "; limits: grid (1..2147483647, 1..65535, 1..65535), 1..1024 threads, " +
                             std::to_string(MAX_SHARED_BYTES) + " bytes");
}

#if defined(VITKERNELS_HOST_TWIN)

// Streaming multiprocessors of the current device; one unless a test says otherwise, so that small problems
// fill it.
inline int multiprocessors() {
  return twin::processors();
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Dim3 grid, int threads, size_t shared_bytes, Stream,
            Arguments&&... arguments) {
  check_launch(grid, threads, shared_bytes);
  // As on the device, every thread starts from its own copy of the parameters.
  const std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  twin::run_grid(reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z}, threads, shared_bytes,
                 [&] { std::apply(kernel, values); });
}

template <typename... Parameters, typename... Arguments>
void launch_dependent(void (*kernel)(Parameters...), Dim3 grid, int threads, size_t shared_bytes,
                      Stream stream, Arguments&&... arguments) {
  launch(kernel, grid, threads, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

#else

[[noreturn]] inline void throw_cuda_error(cudaError_t error, const std::string& what) {
  cudaGetLastError();  // a refused launch must not resurface in the caller's next CUDA call
  throw std::runtime_error(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Whether a kernel may start early, also in a captured graph: only code compiled for 9.0 or later waits for
// the launch before it, and a later device may run what was compiled from PTX for an earlier one.
inline bool starts_early(const void* kernel) {
  int driver = 0;
  cudaFuncAttributes attributes = {};
  return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030 &&
         cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// Streaming multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) throw_cuda_error(error, "the number of multiprocessors");
  return count;
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(bool early, void (*kernel)(Parameters...), Dim3 grid, int threads, size_t shared_bytes,
                   Stream stream, Arguments&&... arguments) {
  check_launch(grid, threads, shared_bytes);
  const void* function = reinterpret_cast<const void*>(kernel);
  const auto fail = [&](cudaError_t error) {
    throw_cuda_error(error, "kernel launch failed: " + describe_launch(grid, threads, shared_bytes));
  };
  if (shared_bytes > 48 * 1024) {
    // Always the device's own limit, never this launch's size: another thread may be between here and its
    // launch of the same kernel with a larger one.
    int device = 0, limit = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (error != cudaSuccess) fail(error);
  }
  std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  auto pointers = std::apply(
      [](auto&... value) { return std::array<void*, sizeof...(Parameters)>{static_cast<void*>(&value)...}; },
      values);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z));
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelExC(&config, function, pointers.data());
  if (error != cudaSuccess) fail(error);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Dim3 grid, int threads, size_t shared_bytes, Stream stream,
            Arguments&&... arguments) {
  launch_kernel(false, kernel, grid, threads, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

// Of a kernel that calls wait_for_launch() in all of its blocks, before it reads what the launches before it
// on the stream write and before it writes at all. The one before it must be ours: what came before that has
// then ended too, when it began, or when its own blocks went on from wait_for_launch().
template <typename... Parameters, typename... Arguments>
void launch_dependent(void (*kernel)(Parameters...), Dim3 grid, int threads, size_t shared_bytes,
                      Stream stream, Arguments&&... arguments) {
  const bool early = START_EARLY && starts_early(reinterpret_cast<const void*>(kernel));
  launch_kernel(early, kernel, grid, threads, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

#endif

}  // namespace vitkernels
