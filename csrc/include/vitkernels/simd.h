// Vectors for the CPU kernels: one width per instruction set, loads that convert, exp2, log2, transpose.
//
// Included only by files that are compiled once per instruction set, each time with another
// VITKERNELS_ISA, the namespace everything lives in. Such files must not use inline functions or
// templates from anywhere else (std:: included): the linker keeps one copy of those, and it may be the
// one that the target machine cannot execute.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(VITKERNELS_ISA)
#error "compile with -DVITKERNELS_ISA=<namespace of the instruction set>"
#endif
#define VITKERNELS_INLINE static inline __attribute__((always_inline))

namespace vitkernels::VITKERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int Lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * Lanes)));
};
template <class T>
using Vec = typename VectorOf<T, kLanes<T>>::type;

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
};
template <>
struct Bits<double> {
  using type = int64_t;
};
template <class T>
using IntVec = Vec<typename Bits<T>::type>;

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// What a kernel computes in when its tensors hold E.
template <class E>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class E>
using Compute = typename ComputeOf<E>::type;

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

VITKERNELS_INLINE int imin(int a, int b) { return a < b ? a : b; }
VITKERNELS_INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }
template <class T>
VITKERNELS_INLINE int round_up_lanes(int n) {
  return ceil_div(n, kLanes<T>) * kLanes<T>;
}

template <class V, class P>
VITKERNELS_INLINE V load_bytes(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class P>
VITKERNELS_INLINE void store_bytes(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
template <class V, class U>
VITKERNELS_INLINE V bit_cast(U u) {
  static_assert(sizeof(V) == sizeof(U));
  V v;
  __builtin_memcpy(&v, &u, sizeof(V));
  return v;
}
// x + v{} would turn -0 into +0.
template <class T>
VITKERNELS_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
template <class V>
VITKERNELS_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}

// ---- 16-bit formats, kLanes<float> elements at a time

using HalfVec = typename VectorOf<uint16_t, kLanes<float>>::type;
using U32Vec = Vec<uint32_t>;

VITKERNELS_INLINE Vec<float> widen(HalfVec h, bf16) {
  return bit_cast<Vec<float>>(__builtin_convertvector(h, U32Vec) << 16);
}
VITKERNELS_INLINE HalfVec narrow(Vec<float> x, bf16) {
  const U32Vec u = bit_cast<U32Vec>(x);
  const U32Vec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (u >> 16) | 0x40u, HalfVec);
}

// The zero-masking forms spare GCC warnings about their undefined pass-through operand.
VITKERNELS_INLINE Vec<float> widen(HalfVec h, f16) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(h)));
#elif defined(__F16C__)
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
#else
  // The product by 2^112 rebiases the exponent, subnormals included.
  const U32Vec u = __builtin_convertvector(h, U32Vec);
  const U32Vec magnitude = (u & 0x7fffu) << 13;
  const U32Vec finite = bit_cast<U32Vec>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  return bit_cast<Vec<float>>((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) |
                              (u & 0x8000u) << 16);
#endif
}
VITKERNELS_INLINE HalfVec narrow(Vec<float> x, f16) {
#if defined(__AVX512F__)
  return bit_cast<HalfVec>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bit_cast<HalfVec>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const U32Vec u = bit_cast<U32Vec>(x);
  const U32Vec magnitude = u & 0x7fffffffu;
  // Adding 0.5 aligns a subnormal's mantissa with the last bit of the sum, which rounds it.
  const U32Vec subnormal = bit_cast<U32Vec>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const U32Vec normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U32Vec h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? U32Vec{} + 0x7c00u : h;
  h = magnitude > 0x7f800000u ? U32Vec{} + 0x7e00u : h;
  return __builtin_convertvector(h | (u >> 16 & 0x8000u), HalfVec);
#endif
}

// ---- loads and stores of kLanes<Compute<E>> elements, or of the first `count` of them

template <class E>
VITKERNELS_INLINE Vec<Compute<E>> load(const E* p) {
  if constexpr (kSame<E, Compute<E>>)
    return load_bytes<Vec<E>>(p);
  else
    return widen(load_bytes<HalfVec>(p), E{});
}
template <class E>
VITKERNELS_INLINE void store(E* p, Vec<Compute<E>> x) {
  if constexpr (kSame<E, Compute<E>>)
    store_bytes(p, x);
  else
    store_bytes(p, narrow(x, E{}));
}

template <class E>
VITKERNELS_INLINE Vec<Compute<E>> load_first(const E* p, int count) {
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (kSame<E, float>)
    return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  else if constexpr (kSame<E, double>)
    return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
  else
    return widen(bit_cast<HalfVec>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p)), E{});
#else
  constexpr int lanes = kLanes<Compute<E>>;
  E whole[lanes] = {};
  for (int i = 0; i < count && i < lanes; ++i) whole[i] = p[i];
  return load(whole);
#endif
}
template <class E>
VITKERNELS_INLINE void store_first(E* p, Vec<Compute<E>> x, int count) {
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (kSame<E, float>)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), bit_cast<__m512>(x));
  else if constexpr (kSame<E, double>)
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), bit_cast<__m512d>(x));
  else
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), bit_cast<__m256i>(narrow(x, E{})));
#else
  constexpr int lanes = kLanes<Compute<E>>;
  E whole[lanes];
  store(whole, x);
  for (int i = 0; i < count && i < lanes; ++i) p[i] = whole[i];
#endif
}

template <class E>
VITKERNELS_INLINE Compute<E> load_one(const E* p) {
  if constexpr (kSame<E, Compute<E>>)
    return *p;
  else
    return load_first(p, 1)[0];
}
template <class E>
VITKERNELS_INLINE void store_one(E* p, Compute<E> x) {
  if constexpr (kSame<E, Compute<E>>)
    *p = x;
  else
    store_first(p, broadcast(x), 1);
}

// ---- elementary functions

template <class T>
struct Exp2;
// Minimax on [-1/2, 1/2]: relative error 2e-9 and 4e-20, below the rounding of the evaluation.
template <>
struct Exp2<float> {
  static constexpr int kDegree = 6, kMantissa = 23;
  static constexpr float kRound = 0x1.8p23f + 127, kLowest = -126.0f;
  static constexpr float kPoly[] = {1.0f,          0.693147207f,   0.240226509f,  0.0555032723f,
                                    0.00961805667f, 0.00134004282f, 0.000154614447f};
};
template <>
struct Exp2<double> {
  static constexpr int kDegree = 12, kMantissa = 52;
  static constexpr double kRound = 0x1.8p52 + 1023, kLowest = -1022.0;
  static constexpr double kPoly[] = {1.0,
                                     0.69314718055994530835,
                                     0.24022650695910071228,
                                     0.055504108664821698992,
                                     0.0096181291076284830543,
                                     0.0013333558146390352775,
                                     0.00015403530393362755291,
                                     0.000015252733856293466416,
                                     1.3215486815999976975e-6,
                                     1.017805119296064896e-7,
                                     7.0548943863483480445e-9,
                                     4.4566753410492058782e-10,
                                     2.5733568308756891235e-11};
};

// 2^x for x <= about 126 (1022): 1 ulp; 0 below the smallest normal number, so also at -inf; NaN at NaN.
template <class T>
VITKERNELS_INLINE Vec<T> exp2_nonpositive(Vec<T> x) {
  using C = Exp2<T>;
  using I = IntVec<T>;
  const I tiny = x < C::kLowest;
  const Vec<T> clamped = tiny ? Vec<T>{} : x;
  const Vec<T> shifted = clamped + C::kRound;  // low mantissa bits: the rounded integer part, as an exponent
  const Vec<T> f = clamped - (shifted - C::kRound);
  Vec<T> p = broadcast(C::kPoly[C::kDegree]);
#pragma GCC unroll 16
  for (int i = C::kDegree - 1; i >= 0; --i) p = p * f + C::kPoly[i];
  const Vec<T> power = p * bit_cast<Vec<T>>(bit_cast<I>(shifted) << C::kMantissa);
  return tiny ? Vec<T>{} : power;
}

// log2(x) for normal x: about 1 ulp of the larger of log2(x) and 1; NaN at NaN and infinity.
template <class T>
VITKERNELS_INLINE Vec<T> log2_positive(Vec<T> x) {
  using I = IntVec<T>;
  constexpr int mantissa = Exp2<T>::kMantissa;
  constexpr typename Bits<T>::type one = static_cast<typename Bits<T>::type>(sizeof(T) == 4 ? 127 : 1023)
                                         << mantissa;
  // 0.7 in [sqrt(1/2), 1): mantissas are brought to about [0.7, 1.4).
  const I bits = bit_cast<I>(x) + (one - bit_cast<IntVec<T>>(broadcast(T(0.70710678)))[0]);
  const I exponent = (bits >> mantissa) - (one >> mantissa);
  const Vec<T> m = bit_cast<Vec<T>>(bit_cast<I>(x) - (exponent << mantissa));
  const Vec<T> s = (m - T(1)) / (m + T(1));
  const Vec<T> s2 = s * s;
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;  // s^2 <= 0.0295
  Vec<T> series = broadcast(T(1) / T(2 * terms + 1));
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 0; --i) series = series * s2 + T(1) / T(2 * i + 1);
  constexpr T two_log2e = T(2.8853900817779268147);
  return __builtin_convertvector(exponent, Vec<T>) + s * series * two_log2e + (x - x);
}

// ---- transpose

#if defined(__clang__)
#define VITKERNELS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VITKERNELS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec<T>{__VA_ARGS__})
#endif

// lo, hi <- a0 b0 a1 b1 ...
template <class T>
VITKERNELS_INLINE void interleave(Vec<T> a, Vec<T> b, Vec<T>& lo, Vec<T>& hi) {
  if constexpr (kLanes<T> == 2) {
    lo = VITKERNELS_SHUFFLE(a, b, 0, 2);
    hi = VITKERNELS_SHUFFLE(a, b, 1, 3);
  } else if constexpr (kLanes<T> == 4) {
    lo = VITKERNELS_SHUFFLE(a, b, 0, 4, 1, 5);
    hi = VITKERNELS_SHUFFLE(a, b, 2, 6, 3, 7);
  } else if constexpr (kLanes<T> == 8) {
    lo = VITKERNELS_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    hi = VITKERNELS_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    static_assert(kLanes<T> == 16);
    lo = VITKERNELS_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    hi = VITKERNELS_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// Each pass interleaves the upper half of the rows into the lower; log2(lanes) passes transpose.
template <class T>
VITKERNELS_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
#pragma GCC unroll 4
  for (int pass = 1; pass < lanes; pass *= 2) {
    Vec<T> next[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) interleave<T>(rows[i], rows[i + lanes / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

}  // namespace vitkernels::VITKERNELS_ISA
