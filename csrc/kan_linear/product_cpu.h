// The blocked products of the CPU kernels, on matrix_cpu.h's block product.
#pragma once
#include "basis_cpu.h"

namespace vitkernels::kan_linear::VITKERNELS_ISA {

// A block of C: kRows rows by one panel of two vectors. A panel of B [depth][kWidth] lies in L1.
constexpr int kRows = kVectorRegisters == 32 ? 12 : 6;
constexpr int kNarrowRows = 12;  // of a panel of one vector, whose fewer sums would wait for each other
template <class T>
constexpr int kWidth = 2 * kLanes<T>;
constexpr int kDepth = 256;  // of one chain of sums, and of a panel
constexpr int kSlice = 128;  // columns of Phi at a time in the backward pass
constexpr int kBlock = 128;  // rows of x at a time

template <class T, int V, int R>
VITKERNELS_INLINE void multiply_group(const Product<T>& p) {
  // What is added to comes from L3 at worst, and is asked for only after the sums.
  for (int r = 0; p.add && r < p.rows; ++r) __builtin_prefetch(p.add + r * p.add_row);
  multiply_rows<T, V, R>(p, p.rows, 0, 0);
}

// All rows of a panel, in equal groups.
template <class T>
static void multiply_panel(Product<T> p) {
  const int rows = p.rows, groups = ceil_div(rows, kRows);
  for (int i = 0, row = 0; i < groups; ++i, row += p.rows) {
    p.rows = ceil_div(rows - row, groups - i);
    multiply_group<T, 2, kRows>(p);
    p.a += p.rows * p.a_row;
    p.c += p.rows * p.c_row;
    if (p.add) p.add += p.rows * p.add_row;
  }
}

template <class E>
VITKERNELS_INLINE E* row_of(const View& view, int64_t row) {
  return static_cast<E*>(view.data) + row * view.stride[0];
}

// dst[i] = src[i] for count elements, zeros up to the next vector.
template <class E, class T>
VITKERNELS_INLINE void convert_row(T* dst, const E* src, int count) {
  constexpr int L = kLanes<T>;
  const int whole = count / L * L;
  for (int i = 0; i < whole; i += L) store(dst + i, load(src + i));
  if (whole < count) store(dst + whole, load_first(src + whole, count - whole));
}

// Mean and 1 / standard deviation of each row.
template <class E, class T>
static void row_statistics(const Params& p, int64_t first, int rows, T* mean, T* rstd) {
  constexpr int L = kLanes<T>;
  const int n = p.channels, whole = n / L * L;
  for (int r = 0; r < rows; ++r) {
    const E* x = row_of<const E>(p.x, first + r);
    Vec<T> sum[4] = {};
    for (int c = 0; c < whole; c += L) sum[c / L & 3] += load(x + c);
    if (whole < n) sum[0] += load_first(x + whole, n - whole);
    const T m = across<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) / n;
    Vec<T> distances[4] = {}, squares[4] = {};
    for (int c = 0; c < whole; c += L) {
      const Vec<T> d = load(x + c) - m;
      distances[c / L & 3] += d;
      squares[c / L & 3] += d * d;
    }
    T rest = 0, rest_squares = 0;
    for (int c = whole; c < n; ++c) {
      const T d = load_one(x + c) - m;
      rest += d;
      rest_squares += d * d;
    }
    const auto average = [&](const Vec<T>* of, T others) {
      return (across<T>((of[0] + of[1]) + (of[2] + of[3])) + others) / n;
    };
    // What the mean was rounded by: where all channels are alike, 1 / sqrt(eps) would multiply it.
    const T shift = average(distances, rest), variance = average(squares, rest_squares) - shift * shift;
    const T spread = (variance < 0 ? T(0) : variance) + static_cast<T>(p.eps);
    mean[r] = m + shift;
    rstd[r] = T(1) / static_cast<T>(__builtin_sqrt(static_cast<double>(spread)));
  }
}

}  // namespace vitkernels::kan_linear::VITKERNELS_ISA
