// Vectors for the CPU kernels: one width per instruction set, loads that convert, exp, log, transpose.
//
// Included only by files that are compiled once per instruction set, each time with another
// VITKERNELS_ISA, the namespace everything lives in. Such files must not use inline functions or
// templates from anywhere else (std:: included): the linker keeps one copy of those, and it may be the
// one that the target machine cannot execute.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX2__)
// GCC 12 takes the undefined pass-through operands inside its own header for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "vitkernels/params.h"

#if !defined(VITKERNELS_ISA)
#error "compile with -DVITKERNELS_ISA=<namespace of the instruction set>"
#endif
#define VITKERNELS_INLINE static inline __attribute__((always_inline))

namespace vitkernels::VITKERNELS_ISA {

// VITKERNELS_INTRINSICS: the vector width in bits whose own instructions may be named. Emulated AVX-512 has
// its lanes and tiles, and so its sums and roundings, in whatever instructions the compiler finds.
#if defined(__AVX512F__)
#define VITKERNELS_INTRINSICS 512
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(VITKERNELS_EMULATE_AVX512)
#define VITKERNELS_INTRINSICS 0
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
#define VITKERNELS_INTRINSICS 256
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
#define VITKERNELS_INTRINSICS 0
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
#define VITKERNELS_INTRINSICS 0
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

// A number that decides what is compiled, as an argument.
template <int N>
struct Constant {
  static constexpr int value = N;
};

// run(E{}), E being the type of a dtype's elements.
// launch.h has the same for the device; no template is shared with it, for the reason above.
template <class Run>
VITKERNELS_INLINE auto with_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::f64:
      return run(double{});
    case DType::f32:
      return run(float{});
    case DType::f16:
      return run(f16{});
    case DType::bf16:
      return run(bf16{});
  }
  __builtin_unreachable();
}

// run(E{}, D{}) with the types of both, where `other` is `dtype`, or float32 beside half precision.
template <class Run>
VITKERNELS_INLINE auto with_dtypes(DType dtype, DType other, Run run) {
  return with_dtype(dtype, [&](auto element) {
    if constexpr (sizeof(element) < sizeof(float))
      if (other == DType::f32) return run(element, float{});
    return run(element, element);
  });
}

VITKERNELS_INLINE int imin(int a, int b) {
  return a < b ? a : b;
}
VITKERNELS_INLINE int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}
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
// a > b ? a : b, so b where either is NaN. Spelled out: GCC compares and blends otherwise.
VITKERNELS_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) {
#if VITKERNELS_INTRINSICS == 512
  return bit_cast<Vec<float>>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif VITKERNELS_INTRINSICS == 256
  return bit_cast<Vec<float>>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
VITKERNELS_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) {
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

VITKERNELS_INLINE Vec<float> widen(HalfVec h, f16) {
#if VITKERNELS_INTRINSICS == 512
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(h)));
#elif VITKERNELS_INTRINSICS == 256
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
#else
  // The product by 2^112 rebiases the exponent, subnormals included.
  const U32Vec u = __builtin_convertvector(h, U32Vec);
  const U32Vec magnitude = (u & 0x7fffu) << 13;
  const U32Vec finite = bit_cast<U32Vec>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  return bit_cast<Vec<float>>((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | (u & 0x8000u)
                                                                                                  << 16);
#endif
}
VITKERNELS_INLINE HalfVec narrow(Vec<float> x, f16) {
#if VITKERNELS_INTRINSICS == 512
  return bit_cast<HalfVec>(_mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif VITKERNELS_INTRINSICS == 256
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

// Copies the first `count` < 2 * Half elements by halves: three moves where a loop would take seven.
template <class E, int Half>
VITKERNELS_INLINE void copy_few(E* to, const E* from, int count) {
  if (count & Half) {
    __builtin_memcpy(to, from, Half * sizeof(E));
    to += Half;
    from += Half;
  }
  if constexpr (Half > 1) copy_few<E, Half / 2>(to, from, count);
}

template <class E>
VITKERNELS_INLINE Vec<Compute<E>> load_first(const E* p, int count) {
#if VITKERNELS_INTRINSICS == 512
  const unsigned mask = (1u << count) - 1;
  if constexpr (kSame<E, float>)
    return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  else if constexpr (kSame<E, double>)
    return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
  else
    return widen(bit_cast<HalfVec>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p)), E{});
#else
#if VITKERNELS_INTRINSICS == 256
  if constexpr (kSame<E, float>) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
    return bit_cast<Vec<float>>(_mm256_maskload_ps(p, mask));
  }
#endif
  constexpr int lanes = kLanes<Compute<E>>;
  if (count >= lanes) return load(p);
  E whole[lanes] = {};
  copy_few<E, lanes / 2>(whole, p, count);
  return load(whole);
#endif
}
template <class E>
VITKERNELS_INLINE void store_first(E* p, Vec<Compute<E>> x, int count) {
#if VITKERNELS_INTRINSICS == 512
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
  if (count >= lanes)
    store(p, x);
  else
    copy_few<E, lanes / 2>(p, whole, count);
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
struct Exp;
// Minimax on [-ln2 / 2, ln2 / 2]: relative error 2e-9 and 4e-20, below the rounding of the evaluation.
// ln2 is split so that its head times an exponent is exact without FMA too.
template <>
struct Exp<float> {
  static constexpr int kDegree = 6, kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f + kBias, kLowest = -88.02f;
  static constexpr float kLn2Head = 0x1.62e4p-1f, kLn2Tail = 1.4286068203094172e-6f;
  static constexpr float kPoly[] = {1.0f,
                                    1.00000003774f,
                                    0.500000004715f,
                                    0.16666415414f,
                                    0.0416663527711f,
                                    0.00837513477462f,
                                    0.00139411188958f};
};
template <>
struct Exp<double> {
  static constexpr int kDegree = 12, kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52 + kBias, kLowest = -709.08;
  static constexpr double kLn2Head = 0x1.62e42fefa3p-1, kLn2Tail = 2.8235290563031577123e-13;
  static constexpr double kPoly[] = {1.0,
                                     1.0,
                                     0.5,
                                     0.16666666666666702447,
                                     0.041666666666666692218,
                                     0.0083333333333095080192,
                                     0.0013888888888871874609,
                                     0.00019841269909257902924,
                                     0.000024801587350139931374,
                                     2.7557224920652138562e-6,
                                     2.7557251877225082805e-7,
                                     2.5114882095880340225e-8,
                                     2.0921588938971492377e-9};
};

// e^x for x up to about 80 (700), 1 ulp; 0 from where e^x leaves the normal numbers, so also at -inf; NaN at
// NaN.
template <class T>
VITKERNELS_INLINE Vec<T> exp_softmax(Vec<T> x) {
  using C = Exp<T>;
  // At kLowest the exponent field comes out as 0, which makes the power below a zero.
  const Vec<T> clamped = vmax(broadcast(C::kLowest), x);
  // The sum's low mantissa bits hold the rounded quotient, biased as an exponent.
  const Vec<T> shifted = clamped * T(1.4426950408889634074) + C::kRound;
  const Vec<T> quotient = shifted - C::kRound;
  const Vec<T> f = (clamped - quotient * C::kLn2Head) - quotient * C::kLn2Tail;
  Vec<T> p = broadcast(C::kPoly[C::kDegree]);
#pragma GCC unroll 16
  for (int i = C::kDegree - 1; i >= 0; --i) p = p * f + C::kPoly[i];
  return p * bit_cast<Vec<T>>(bit_cast<IntVec<T>>(shifted) << C::kMantissa);
}

// ln(x) for normal x: about 1 ulp of the larger of |ln(x)| and 1; NaN at NaN and infinity.
template <class T>
VITKERNELS_INLINE Vec<T> log_softmax(Vec<T> x) {
  using C = Exp<T>;
  using I = IntVec<T>;
  // Subtracting the bits of sqrt(1/2) carries into the exponent so that the mantissa lands in [0.707, 1.414).
  const I root_half = bit_cast<I>(broadcast(T(0.70710678118654752440)));
  const I exponent = (bit_cast<I>(x) - root_half) >> C::kMantissa;
  const Vec<T> m = bit_cast<Vec<T>>(bit_cast<I>(x) - (exponent << C::kMantissa));
  const Vec<T> s = (m - T(1)) / (m + T(1));
  const Vec<T> s2 = s * s;
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;  // s2 <= 0.0295
  Vec<T> series = broadcast(T(2) / T(2 * terms + 1));
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 0; --i) series = series * s2 + T(2) / T(2 * i + 1);
  const Vec<T> e = __builtin_convertvector(exponent, Vec<T>);
  return e * C::kLn2Head + (e * C::kLn2Tail + s * series) + (x - x);
}

// The lanes folded into one, by halves.
template <class T, class Fold>
VITKERNELS_INLINE T across_lanes(Vec<T> x, Fold fold) {
  T part[kLanes<T>];
  store(part, x);
#pragma GCC unroll 3
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i) part[i] = fold(part[i], part[i + half]);
  return part[0];
}

// Sum of the lanes.
template <class T>
VITKERNELS_INLINE T across(Vec<T> x) {
  return across_lanes<T>(x, [](T a, T b) { return a + b; });
}

// The largest lane.
template <class T>
VITKERNELS_INLINE T largest(Vec<T> x) {
  return across_lanes<T>(x, [](T a, T b) { return b > a ? b : a; });
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

#if VITKERNELS_INTRINSICS == 256
// 16 shuffles within the halves of a register and 8 that exchange halves; interleaving whole registers takes
// twice as many.
VITKERNELS_INLINE void transpose_8x8(Vec<float> (&rows)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    const __m256 even = bit_cast<__m256>(rows[i]), odd = bit_cast<__m256>(rows[i + 1]);
    a[i] = _mm256_unpacklo_ps(even, odd);
    a[i + 1] = _mm256_unpackhi_ps(even, odd);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = bit_cast<Vec<float>>(_mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
    rows[i + 4] = bit_cast<Vec<float>>(_mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
  }
}
#endif

// Each pass interleaves the upper half of the rows into the lower; log2(lanes) passes transpose.
template <class T>
VITKERNELS_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
#if VITKERNELS_INTRINSICS == 256
  if constexpr (kSame<T, float>) return transpose_8x8(rows);
#endif
  constexpr int lanes = kLanes<T>;
#pragma GCC unroll 4
  for (int pass = 1; pass < lanes; pass *= 2) {
    Vec<T> next[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i)
      interleave<T>(rows[i], rows[i + lanes / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

// Lane i: the sum of the lanes of rows[i], by halves. Leaves the rows undefined.
template <class T>
VITKERNELS_INLINE Vec<T> lane_sums(Vec<T> (&rows)[kLanes<T>]) {
  transpose<T>(rows);
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) rows[i] += rows[i + half];
  return rows[0];
}

}  // namespace vitkernels::VITKERNELS_ISA
