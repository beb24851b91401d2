// e^(u kappa) as eight or ten products of a function of u and one of kappa.
//
// A polynomial in u kappa of as many terms would reach half as far: the best products are those of the
// singular vectors of the function on its square, here mixed so that phi_j begins with u^j and meets no other
// power below u^kTerms. The first kTaylor are Taylor's: where u is small, so are the errors.
// scripts/low_rank_exponential.py found them. For |u| <= kReach and |kappa| <= 1 their sum is within 1.1e-8
// of e^(u kappa), its derivatives within 1.2e-7 of theirs. Every term is about (u kappa)^j / j!, so what is
// rounded is relative to e^|u kappa|: see Expansion::ratio_of_ends.
#pragma once
#include "tiles_cpu.h"

namespace vitkernels::strip_attention {
namespace VITKERNELS_ISA {

constexpr int kShapes = 4;

// phi_j(u) = u^j + kBeyond[j] u^(kTerms or kTerms + 1), of j's parity.
// psi_j(kappa) = sum_i kShape[j - kTaylor][i] kappa^(kTaylor + 2 i), times kappa where j is odd.
template <int kTerms>
struct Series;

template <>
struct Series<8> {
  static constexpr int kTaylor = 2;
  static constexpr float kReach = 1.05f;
  static constexpr float kBeyond[] = {
      0, 0, 1.538529e-05f, 6.76254101e-06f, -0.000932401808f, -0.000594658708f, 0.0409737009f, 0.0336324809f};
  static constexpr float kShape[][kShapes] = {
      {0.499997281f, 1.38306419e-05f, -2.05525306e-05f, 9.36471932e-06f},
      {0.166666131f, 2.37018341e-06f, -3.23277771e-06f, 1.38881979e-06f},
      {1.25447999e-05f, 0.0416029163f, 9.45758157e-05f, -4.28776788e-05f},
      {2.14982622e-06f, 0.00832382847f, 1.29448956e-05f, -5.53654416e-06f},
      {-1.69086178e-05f, 8.57830528e-05f, 0.00126205621f, 5.69139327e-05f},
      {-2.65961422e-06f, 1.17414019e-05f, 0.000182469403f, 6.75741991e-06f}};
};

template <>
struct Series<10> {
  static constexpr int kTaylor = 4;
  static constexpr float kReach = 1.8f;
  static constexpr float kBeyond[] = {0,
                                      0,
                                      0,
                                      0,
                                      3.69686779e-06f,
                                      1.86839904e-06f,
                                      -0.000441463065f,
                                      -0.000296021883f,
                                      0.0305761465f,
                                      0.0254227776f};
  static constexpr float kShape[][kShapes] = {
      {0.0416646736f, 8.06384085e-06f, -1.03133773e-05f, 4.17977902e-06f},
      {0.00833309804f, 9.00567185e-07f, -1.106645e-06f, 4.35602447e-07f},
      {2.48883977e-06f, 0.00137884022f, 1.27983942e-05f, -5.12175511e-06f},
      {2.77952835e-07f, 0.000197350781f, 1.3001677e-06f, -5.06159147e-07f},
      {-9.82450966e-07f, 3.95012165e-06f, 1.98129111e-05f, 1.94437042e-06f},
      {-1.05418857e-07f, 4.01286326e-07f, 2.26802304e-06f, 1.85562899e-07f}};
};

constexpr int kFewTerms = 8, kMostTerms = 10;

// Calls visit with the number of terms as a constant.
template <class Visit>
VITKERNELS_INLINE void with_terms(int terms, Visit visit) {
  if (terms == kFewTerms)
    visit(Constant<kFewTerms>{});
  else
    visit(Constant<kMostTerms>{});
}

#define VITKERNELS_INLINE_MEMBER inline __attribute__((always_inline))

template <class T, int kTerms>
struct Terms {
  using Of = Series<kTerms>;
  Vec<T> power[kTerms + 2];  // u^j

  VITKERNELS_INLINE_MEMBER explicit Terms(Vec<T> u) {
    power[0] = broadcast(T(1));
    power[1] = u;
#pragma GCC unroll 16
    for (int j = 2; j < kTerms + 2; ++j) power[j] = power[j / 2] * power[j - j / 2];
  }
  // phi_j and its derivative
  VITKERNELS_INLINE_MEMBER Vec<T> term(int j) const {
    return j < Of::kTaylor ? power[j] : power[j] + T(Of::kBeyond[j]) * power[kTerms + j % 2];
  }
  VITKERNELS_INLINE_MEMBER Vec<T> slope(int j) const {
    if (j == 0) return Vec<T>{};
    const int beyond = kTerms + j % 2;
    const Vec<T> first = T(j) * power[j - 1];
    return j < Of::kTaylor ? first : first + T(Of::kBeyond[j] * beyond) * power[beyond - 1];
  }
};

template <class T, int kTerms>
struct KeyTerms {
  using Of = Series<kTerms>;
  static constexpr int kTaylor = Of::kTaylor;
  static_assert(kTaylor % 2 == 0 && kTaylor <= 4, "the powers here");
  Vec<T> power[kTaylor + 1], square;  // kappa^j

  VITKERNELS_INLINE_MEMBER explicit KeyTerms(Vec<T> kappa) : square(kappa * kappa) {
    power[0] = broadcast(T(1));
    power[1] = kappa;
#pragma GCC unroll 16
    for (int j = 2; j <= kTaylor; ++j) power[j] = power[j / 2] * power[j - j / 2];
  }
  // psi_j
  VITKERNELS_INLINE_MEMBER Vec<T> term(int j) const {
    if (j < kTaylor) return power[j] * T(kInverse[j]);
    const float* shape = Of::kShape[j - kTaylor];
    Vec<T> sum = broadcast(T(shape[kShapes - 1]));
#pragma GCC unroll 16
    for (int i = kShapes - 2; i >= 0; --i) sum = sum * square + T(shape[i]);
    sum *= power[kTaylor];
    return j % 2 ? sum * power[1] : sum;
  }

  static constexpr double kInverse[] = {1, 1, 1. / 2, 1. / 6};  // of j!
};

// sum_j factor_j psi_j, and its derivative
template <int kTerms, class T>
VITKERNELS_INLINE void sum_key_terms(Vec<T> kappa, const Vec<T> (&factor)[kTerms], Vec<T>* value,
                                     Vec<T>* slope) {
  using Of = Series<kTerms>;
  constexpr int kTaylor = Of::kTaylor, kPowers = kTaylor + 2 * kShapes;
  Vec<T> coefficient[kPowers];  // of kappa^j
#pragma GCC unroll 16
  for (int j = 0; j < kPowers; ++j) {
    const int shape = (j - kTaylor) / 2;
    if (j < kTaylor) {
      coefficient[j] = factor[j] * T(KeyTerms<T, kTerms>::kInverse[j]);
      continue;
    }
    Vec<T> sum = {};
#pragma GCC unroll 16
    for (int i = j % 2; i < kTerms - kTaylor; i += 2) sum += factor[kTaylor + i] * T(Of::kShape[i][shape]);
    coefficient[j] = sum;
  }
  Vec<T> sum = coefficient[kPowers - 1], derivative = {};
#pragma GCC unroll 16
  for (int j = kPowers - 2; j >= 0; --j) {
    derivative = derivative * kappa + sum;
    sum = sum * kappa + coefficient[j];
  }
  *value = sum;
  *slope = derivative;
}
#undef VITKERNELS_INLINE_MEMBER

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
