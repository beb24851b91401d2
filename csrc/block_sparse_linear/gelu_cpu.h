// The exact GELU, z Phi(z), and its derivative, Phi(z) + z phi(z).
#pragma once
#include "vitkernels/simd.h"

namespace vitkernels::block_sparse_linear::VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

// Phi(z), and e^(-z^2 / 2) in `bell`. Phi's absolute error is about one rounding of its value.
template <class T>
VITKERNELS_INLINE Vec<T> normal_cdf(Vec<T> z, Vec<T>& bell) {
  bell = exp_softmax<T>(z * z * T(-0.5));
  if constexpr (kSame<T, double>) {
    Vec<T> cdf;
    for (int i = 0; i < kLanes<T>; ++i) cdf[i] = 0.5 * __builtin_erfc(-0.70710678118654752440 * z[i]);
    return cdf;
  } else {
    // erfc(a) e^(a^2) = t P(t), t = 1 / (1 + 0.4 a): fitted for a <= 9.5, absolute error of erfc 7e-10.
    constexpr T poly[] = {0.22497019999f,  0.23680137265f, 0.13571445163f,  0.42359837829f,
                          -0.40219926431f, 0.71389517737f, -0.41070609182f, 0.07792577681f};
    const Vec<T> a = vmax(z, -z) * T(0.70710678118654752440);
    const Vec<T> t = T(1) / (a * T(0.4) + T(1));
    Vec<T> p = broadcast(poly[7]);
#pragma GCC unroll 8
    for (int i = 6; i >= 0; --i) p = p * t + poly[i];
    const Vec<T> tail = p * t * bell * T(0.5);
    return z < T(0) ? tail : T(1) - tail;
  }
}

template <class T>
VITKERNELS_INLINE Vec<T> gelu(Vec<T> z) {
  Vec<T> bell;
  return z * normal_cdf<T>(z, bell);
}

template <class T>
VITKERNELS_INLINE Vec<T> gelu_slope(Vec<T> z) {
  Vec<T> bell;
  const Vec<T> cdf = normal_cdf<T>(z, bell);
  return cdf + z * bell * T(0.39894228040143267794);
}

}  // namespace vitkernels::block_sparse_linear::VITKERNELS_ISA
