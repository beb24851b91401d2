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

// For results of 16 bits, with a relative error of 4e-6 at a third of what erff takes: max(z, 0) - m Phi(-m)
// with m = |z|. The logarithm of Phi(-m) is nearly a parabola; from 6 on m Phi(-m) stays at its 6e-9 there.
// inf and NaN go the way they go with erf.
VK_DEVICE float gelu_for_half(float z) {
  const float size = fabsf(z), m = -larger(-size, -6.0f);
  float log2_phi = -1.8349284e-06f;
  log2_phi = log2_phi * m + 6.1601615e-05f;
  log2_phi = log2_phi * m - 0.00093054271f;
  log2_phi = log2_phi * m + 0.0085079577f;
  log2_phi = log2_phi * m - 0.053960193f;
  log2_phi = log2_phi * m - 0.45846429f;
  log2_phi = log2_phi * m - 1.1512511f;
  log2_phi = log2_phi * m - 0.99999529f;
  return 0.5f * (z + size) - m * exp2_fast(log2_phi);
}

template <class T>
VK_DEVICE accumulate_t<T> activate(accumulate_t<T> z, Activation activation) {
  using Acc = accumulate_t<T>;
  if (activation == Activation::relu) return z < Acc(0) ? Acc(0) : z;
  if (activation == Activation::gelu) {
    if constexpr (sizeof(T) == 2) {
      return gelu_for_half(z);
    } else {
      return Acc(0.5) * z * (Acc(1) + erf_(z * Acc(0.70710678118654752440)));
    }
  }
  return z;
}

}  // namespace vitkernels::block_sparse_linear
