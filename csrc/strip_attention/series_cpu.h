// e^(u kappa) as ten products of a function of u and one of kappa.
//
// A polynomial in u kappa of as many terms would reach half as far: the best products are those of the
// singular vectors of the function on its square, here mixed so that phi_j begins with u^j and meets no other
// power below u^10. The first four are Taylor's: where u is small, so are the errors.
// scripts/low_rank_exponential.py found them. For |u| <= kReach and |kappa| <= 1 their sum is within 2e-9 of
// e^(u kappa), its derivatives within 8e-8 of theirs. Every term is about (u kappa)^j / j!, so what is
// rounded is relative to e^|u kappa|: see Expansion::tame.
#pragma once
#include "tiles_cpu.h"

namespace vitkernels::strip_attention {
namespace VITKERNELS_ISA {

constexpr int kTerms = 10, kTaylor = 4, kPowers = 12;
constexpr float kReach = 1.6f;

// phi_j(u) = u^j + kBeyond[j] u^(10 or 11), of j's parity.
constexpr float kBeyond[kTerms] = {0,
                                   0,
                                   0,
                                   0,
                                   2.40229322e-06f,
                                   1.25648304e-06f,
                                   -0.000331147167f,
                                   -0.000227185682f,
                                   0.0262144254f,
                                   0.0220792756f};
// psi_j(kappa), from j = 4 on: the coefficients of kappa^4, kappa^6, ... or of kappa^5, kappa^7, ...
constexpr int kShapes = (kPowers - kTaylor) / 2;
constexpr float kShape[kTerms - kTaylor][kShapes] = {
    {0.0416661881f, 2.22284145e-06f, -3.21190526e-06f, 1.45893383e-06f},
    {0.0083332741f, 2.57487684e-07f, -3.54463198e-07f, 1.55249136e-07f},
    {8.68297445e-07f, 0.00138486116f, 5.80463294e-06f, -2.6158564e-06f},
    {1.00581127e-07f, 0.000197975985f, 5.99789459e-07f, -2.60859301e-07f},
    {-4.9009785e-07f, 2.26743475e-06f, 2.15510251e-05f, 1.44132566e-06f},
    {-5.40867921e-08f, 2.34292759e-07f, 2.43545431e-06f, 1.37309075e-07f}};

#define VITKERNELS_INLINE_MEMBER inline __attribute__((always_inline))

template <class T>
struct Terms {
  Vec<T> power[kPowers];  // u^j

  VITKERNELS_INLINE_MEMBER explicit Terms(Vec<T> u) {
    power[0] = broadcast(T(1));
    power[1] = u;
#pragma GCC unroll 16
    for (int j = 2; j < kPowers; ++j) power[j] = power[j / 2] * power[j - j / 2];
  }
  // phi_j and its derivative
  VITKERNELS_INLINE_MEMBER Vec<T> term(int j) const {
    return j < kTaylor ? power[j] : power[j] + T(kBeyond[j]) * power[kTerms + j % 2];
  }
  VITKERNELS_INLINE_MEMBER Vec<T> slope(int j) const {
    if (j == 0) return Vec<T>{};
    const int beyond = kTerms + j % 2;
    const Vec<T> first = T(j) * power[j - 1];
    return j < kTaylor ? first : first + T(kBeyond[j] * beyond) * power[beyond - 1];
  }
};

template <class T>
struct KeyTerms {
  Vec<T> kappa, square, third, fourth;

  VITKERNELS_INLINE_MEMBER explicit KeyTerms(Vec<T> kappa)
      : kappa(kappa), square(kappa * kappa), third(square * kappa), fourth(square * square) {}
  // psi_j and its derivative
  VITKERNELS_INLINE_MEMBER Vec<T> term(int j) const {
    if (j < kTaylor) {
      const Vec<T> first[kTaylor] = {broadcast(T(1)), kappa, square * T(1. / 2), third * T(1. / 6)};
      return first[j];
    }
    const float* shape = kShape[j - kTaylor];
    Vec<T> sum = broadcast(T(shape[kShapes - 1]));
#pragma GCC unroll 16
    for (int i = kShapes - 2; i >= 0; --i) sum = sum * square + T(shape[i]);
    sum *= fourth;
    return j % 2 ? sum * kappa : sum;
  }
  VITKERNELS_INLINE_MEMBER Vec<T> slope(int j) const {
    if (j < kTaylor) {
      const Vec<T> first[kTaylor] = {Vec<T>{}, broadcast(T(1)), kappa, square * T(1. / 2)};
      return first[j];
    }
    const float* shape = kShape[j - kTaylor];
    const int odd = j % 2, exponent = kTaylor + odd;
    Vec<T> sum = broadcast(T((exponent + 2 * kShapes - 2) * shape[kShapes - 1]));
#pragma GCC unroll 16
    for (int i = kShapes - 2; i >= 0; --i) sum = sum * square + T((exponent + 2 * i) * shape[i]);
    return sum * (odd ? fourth : third);
  }
};
#undef VITKERNELS_INLINE_MEMBER

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
