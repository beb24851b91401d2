// The basis functions and their slopes in vectors, without a tanh of their own.
//
// With r = e^((u - g) / h): phi = 4 / (r + 1/r)^2 and tanh = (r - 1/r) / (r + 1/r). r is a product of e^(u /
// h), one exponential a channel, and e^(-g / h), a table. The exponential reduces its argument in units of u,
// so that rounding u / h, up to 12, costs nothing. Never is |tanh| taken for sqrt(1 - phi), which cancels
// near the centre. A grid too wide for the table's range takes an exponential for each grid point instead,
// and so do functions so broad that the small tanh is all there is, which the difference of r and 1/r would
// give without its last digits.
#pragma once
#include "kan_linear.h"
#include "vitkernels/matrix_cpu.h"

namespace vitkernels::kan_linear::VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

template <class T>
struct Basis {
  // Beyond kSlack from the outermost centre, in units of h, phi < 2e-17 and u is clamped; |g / h| <= kWidest
  // keeps every product of exponentials a normal fp32.
  static constexpr double kSlack = 20, kWidest = 12, kBroadest = 0.5;

  int grids;
  bool compact;
  double inverse;           // 1 / h
  T limit;                  // |u| beyond which phi is 0
  T per_power, head, tail;  // powers of two in a unit of u; their size in u, split for an exact product
  T *falling, *rising,
      *inside;  // e^(-g / h), e^(g / h), 1, each padded to vectors (by harmless values, and 0)

  // Elements of the tables.
  static size_t size(int grids) { return 3 * (grids + kLanes<T>); }

  void prepare(const Params& p, T* memory) {
    const T* grid = static_cast<const T*>(p.grid.data);
    grids = p.grids;
    inverse = p.inv_denominator;
    double widest = 0;
    for (int m = 0; m < grids; ++m) {
      const double g = grid[m] < 0 ? -grid[m] : grid[m];
      widest = widest < g ? g : widest;
      if (g != g) widest = g;
    }
    compact = widest * inverse <= kWidest && inverse >= kBroadest;
    limit = static_cast<T>(widest + kSlack / inverse);
    const double power = 0.69314718055994530942 / inverse;
    per_power = static_cast<T>(1 / power);
    // The head's low mantissa bits are 0, so that it times a small integer is exact.
    using Integer = typename Bits<T>::type;
    constexpr int kZeros = sizeof(T) == 4 ? 12 : 21;
    head = bit_cast<T>(bit_cast<Integer>(static_cast<T>(power)) & ~((static_cast<Integer>(1) << kZeros) - 1));
    tail = static_cast<T>(power - head);
    const int padded = grids + kLanes<T>;
    falling = memory;
    rising = memory + padded;
    inside = memory + 2 * padded;
    for (int m = 0; m < padded; ++m) {
      const double g = m < grids ? grid[m] : 0;
      falling[m] =
          compact ? static_cast<T>(exp_softmax<double>(broadcast(-g * inverse))[0]) : static_cast<T>(g);
      rising[m] = compact ? static_cast<T>(exp_softmax<double>(broadcast(g * inverse))[0]) : T(0);
      inside[m] = m < grids;
    }
  }

  // What `at` takes of a channel: e^(u / h) and e^(-u / h), or u itself for a wide grid.
  template <bool Compact>
  VITKERNELS_INLINE void enter(Vec<T> u, Vec<T>& up, Vec<T>& down, const Basis& b) {
    if constexpr (!Compact) {
      up = down = u;
    } else {
      using C = Exp<T>;
      using I = IntVec<T>;
      const Vec<T> low = vmax(broadcast(-b.limit), u);
      const Vec<T> clamped = low > b.limit ? broadcast(b.limit) : low;
      const Vec<T> shifted = clamped * b.per_power + C::kRound;
      const Vec<T> quotient = shifted - C::kRound;
      const Vec<T> f = ((clamped - quotient * b.head) - quotient * b.tail) * static_cast<T>(b.inverse);
      const Vec<T> f2 = f * f;
      Vec<T> even = broadcast(C::kPoly[C::kDegree]), odd = broadcast(C::kPoly[C::kDegree - 1]);
#pragma GCC unroll 8
      for (int i = C::kDegree - 2; i >= 0; i -= 2) even = even * f2 + C::kPoly[i];
#pragma GCC unroll 8
      for (int i = C::kDegree - 3; i >= 1; i -= 2) odd = odd * f2 + C::kPoly[i];
      odd *= f;
      const I power = bit_cast<I>(shifted);
      up = (even + odd) * bit_cast<Vec<T>>(power << C::kMantissa);
      down = (even - odd) * bit_cast<Vec<T>>((2 * C::kBias - power) << C::kMantissa);
    }
  }

  // phi / 4 and tanh for the table entries `falls`, `rises`.
  template <bool Compact>
  VITKERNELS_INLINE void at(Vec<T> up, Vec<T> down, Vec<T> falls, Vec<T> rises, Vec<T>& quarter, Vec<T>& tanh,
                            T inverse) {
    if constexpr (Compact) {
      const Vec<T> r = up * falls, reciprocal = down * rises;
      const Vec<T> q = T(1) / (r + reciprocal);
      quarter = q * q;
      tanh = (r - reciprocal) * q;
    } else {
      const Vec<T> distance = (up - falls) * inverse;
      const Vec<T> magnitude = distance < T(0) ? -distance : distance;
      const Vec<T> e = exp_softmax<T>(T(-2) * magnitude);
      const Vec<T> q = T(1) / (T(1) + e);
      quarter = e * q * q;
      const Vec<T> far = (T(1) - e) * q;
      // Lambert's continued fraction, exact to the last digit below 1/4.
      const Vec<T> square = distance * distance;
      Vec<T> fraction = broadcast(T(15));
#pragma GCC unroll 1
      for (int odd = 13; odd > 0; odd -= 2) fraction = T(odd) + square / fraction;
      tanh = magnitude < T(0.25) ? distance / fraction : distance < T(0) ? -far : far;
    }
  }
};

}  // namespace vitkernels::kan_linear::VITKERNELS_ISA
