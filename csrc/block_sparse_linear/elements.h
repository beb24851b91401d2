// What the CUDA kernels of the block-sparse layer share: 16-byte accesses where they are aligned, else
// element by element.
#pragma once
#include "block_sparse_linear.h"
#include "vitkernels/device.h"

namespace vitkernels::block_sparse_linear {

// Elements of a 16-byte access.
template <class T>
constexpr int WIDTH = static_cast<int>(16 / sizeof(T));

// Whether 16-byte accesses to rows are aligned, from their beginning on.
template <class T>
bool aligned(const View& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride[0] % WIDTH<T> == 0;
}

// Copies 16 bytes, or fewer elements one by one where they are not aligned; zeros beyond `count`.
template <class T>
VK_DEVICE void load_chunk(T* to, const T* from, int count, bool vectors) {
  if (vectors) {
    cp_async16(to, from, count > 0);
    return;
  }
  Vec<T, WIDTH<T>> values;
  VK_UNROLL
  for (int e = 0; e < WIDTH<T>; ++e) values[e] = e < count ? from[e] : from_float<T>(0.0f);
  values.store(to);
}

VK_DEVICE float erf_(float x) {
  return erff(x);
}
VK_DEVICE double erf_(double x) {
  return erf(x);
}

}  // namespace vitkernels::block_sparse_linear
