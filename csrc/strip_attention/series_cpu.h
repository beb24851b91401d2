// e^(u kappa) as eight or ten products of a function of u and one of kappa.
//
// A polynomial in u kappa of as many terms would reach half as far: the best products are those of the
// singular vectors of the function on its square, here mixed so that phi_j begins with u^j and meets no other
// power below u^kTerms. The first kTaylor are Taylor's: where u is small, so are the errors.
// scripts/low_rank_exponential.py found them. For |u| <= kReach and |kappa| <= 1 their sum is within 2.1e-9
// of e^(u kappa), its derivatives within 1.3e-7 of theirs. Every term is about (u kappa)^j / j!, so what is
// rounded is relative to e^|u kappa|: see Expansion::tame.
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
  static constexpr float kReach = 0.95f;
  static constexpr float kBeyond[] = {0,
                                      0,
                                      9.83272576e-06f,
                                      4.47981544e-06f,
                                      -0.000702611474f,
                                      -0.000457866431f,
                                      0.0356812832f,
                                      0.0295809243f};
  static constexpr float kShape[][kShapes] = {
      {0.499999355f, 3.86045845e-06f, -6.59740451e-06f, 3.39931257e-06f},
      {0.166666531f, 6.95081759e-07f, -1.07841441e-06f, 5.19796137e-07f},
      {4.27751629e-06f, 0.0416410887f, 4.36642468e-05f, -2.24242994e-05f},
      {7.70173692e-07f, 0.00832938261f, 6.12349825e-06f, -2.94283862e-06f},
      {-8.099882e-06f, 4.83814369e-05f, 0.00130647749f, 4.20439097e-05f},
      {-1.32400999e-06f, 6.78503962e-06f, 0.000187916754f, 5.01423828e-06f}};
};

template <>
struct Series<10> {
  static constexpr int kTaylor = 4;
  static constexpr float kReach = 1.6f;
  static constexpr float kBeyond[] = {0,
                                      0,
                                      0,
                                      0,
                                      2.40229322e-06f,
                                      1.25648306e-06f,
                                      -0.000331147167f,
                                      -0.000227185684f,
                                      0.0262144254f,
                                      0.0220792756f};
  static constexpr float kShape[][kShapes] = {
      {0.0416661881f, 2.22284146e-06f, -3.21190527e-06f, 1.45893384e-06f},
      {0.0083332741f, 2.57487695e-07f, -3.54463211e-07f, 1.55249141e-07f},
      {8.68297445e-07f, 0.00138486116f, 5.80463295e-06f, -2.6158564e-06f},
      {1.0058113e-07f, 0.000197975985f, 5.99789472e-07f, -2.60859306e-07f},
      {-4.9009785e-07f, 2.26743475e-06f, 2.15510251e-05f, 1.44132566e-06f},
      {-5.40867932e-08f, 2.34292763e-07f, 2.43545431e-06f, 1.37309076e-07f}};
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
  // psi_j and its derivative
  VITKERNELS_INLINE_MEMBER Vec<T> term(int j) const {
    if (j < kTaylor) return power[j] * T(kInverse[j]);
    const float* shape = Of::kShape[j - kTaylor];
    Vec<T> sum = broadcast(T(shape[kShapes - 1]));
#pragma GCC unroll 16
    for (int i = kShapes - 2; i >= 0; --i) sum = sum * square + T(shape[i]);
    sum *= power[kTaylor];
    return j % 2 ? sum * power[1] : sum;
  }
  VITKERNELS_INLINE_MEMBER Vec<T> slope(int j) const {
    if (j == 0) return Vec<T>{};
    if (j < kTaylor) return power[j - 1] * T(kInverse[j - 1]);
    const float* shape = Of::kShape[j - kTaylor];
    const int odd = j % 2, exponent = kTaylor + odd;
    Vec<T> sum = broadcast(T((exponent + 2 * kShapes - 2) * shape[kShapes - 1]));
#pragma GCC unroll 16
    for (int i = kShapes - 2; i >= 0; --i) sum = sum * square + T((exponent + 2 * i) * shape[i]);
    return sum * power[exponent - 1];
  }

 private:
  static constexpr double kInverse[] = {1, 1, 1. / 2, 1. / 6};  // of j!
};
#undef VITKERNELS_INLINE_MEMBER

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
