// Element types, their conversions, and short vectors of them. Included through device.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(VITKERNELS_HOST_TWIN)
#include "vitkernels/host_float16.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace vitkernels {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

#if !defined(VITKERNELS_HOST_TWIN)
using half_t = __half;
using bfloat16_t = __nv_bfloat16;

VK_HOST_DEVICE float to_float(half_t x) {
  return __half2float(x);
}
VK_HOST_DEVICE float to_float(bfloat16_t x) {
  return __bfloat162float(x);
}
#endif
VK_HOST_DEVICE float to_float(float x) {
  return x;
}
VK_HOST_DEVICE float to_float(double x) {
  return static_cast<float>(x);
}

VK_HOST_DEVICE double to_double(double x) {
  return x;
}
template <typename T>
VK_HOST_DEVICE double to_double(T x) {
  return to_float(x);
}

// Rounds to nearest even.
template <typename T>
VK_HOST_DEVICE T from_float(float x) {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(x);
  } else {
#if defined(VITKERNELS_HOST_TWIN)
    return T::round(x);
#else
    if constexpr (std::is_same_v<T, half_t>) {
      return __float2half_rn(x);
    } else {
      return __float2bfloat16_rn(x);
    }
#endif
  }
}

// What sums of T are kept in.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

template <typename T>
VK_HOST_DEVICE accumulate_t<T> to_accumulate(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return to_float(x);
  }
}

template <typename T>
VK_HOST_DEVICE T from_accumulate(accumulate_t<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

// Two rounded values in one register, lo in the low half: an operand of mma_m16n8k16.
template <typename T>
VK_DEVICE uint32_t pack2(float lo, float hi) {
  static_assert(sizeof(T) == 2, "pack2 packs two 16-bit values");
#if defined(VITKERNELS_HOST_TWIN)
  return T::round(lo).bits | static_cast<uint32_t>(T::round(hi).bits) << 16;
#else
  uint32_t packed;
  if constexpr (std::is_same_v<T, half_t>) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    memcpy(&packed, &pair, sizeof(packed));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    memcpy(&packed, &pair, sizeof(packed));
  }
  return packed;
#endif
}

// N neighbours moved by one instruction; the pointer must be aligned to the whole vector.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0,
                "a vector is at most 16 bytes, a power of two wide");
  T data[N];

  VK_HOST_DEVICE T& operator[](int i) { return data[i]; }
  VK_HOST_DEVICE const T& operator[](int i) const { return data[i]; }

  VK_DEVICE static Vec load(const T* source);
  VK_DEVICE void store(T* target) const;
};

}  // namespace vitkernels
