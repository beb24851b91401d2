// What crosses the boundary between Python and the kernels: raw pointers, strides, dtypes.
#pragma once
#include <cstdint>

namespace vitkernels {

// The order is shared with vitkernels/core/native.py.
enum class DType : int { f64 = 0, f32 = 1, f16 = 2, bf16 = 3 };

// A tensor of up to five dimensions; strides count elements. A null pointer is an absent argument.
struct View {
  void* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};

  explicit operator bool() const { return data != nullptr; }
};

// cudaStream_t without the CUDA headers.
using Stream = void*;

}  // namespace vitkernels
