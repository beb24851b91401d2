// The products of a head by few terms, whose number is a constant here: they are so short that what
// `multiply` does beside multiplying would be a fifth of their time. Longer sums than its runs are left to
// it.
#pragma once
#include "vitkernels/tile_attention_cpu.h"

namespace vitkernels::strip_attention {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

// to[i][c] = sum_j weights[j][i] terms[j][c] of R rows and V vectors
template <int kTerms, int R, int V, class T>
VITKERNELS_INLINE void combine_block(const T* weights, ptrdiff_t weight_pitch, const T* terms,
                                     ptrdiff_t term_pitch, T* to, ptrdiff_t to_pitch) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[R][V] = {};
  // Unrolled further, the compiler keeps more addresses than there are registers.
#pragma GCC unroll 2
  for (int j = 0; j < kTerms; ++j, weights += weight_pitch, terms += term_pitch) {
    Vec<T> term[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) term[v] = load(terms + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = broadcast(weights[r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += weight * term[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(to + r * to_pitch + v * L, sum[r][v]);
}

// to[i][c] = sum_j weights[j][i] terms[j][c]
template <int kTerms, class T>
static void combine(int count, int vecs, const T* weights, ptrdiff_t weight_pitch, const T* terms,
                    ptrdiff_t term_pitch, T* to, ptrdiff_t to_pitch) {
  constexpr int L = kLanes<T>, R = 5;
  if (count < R) {
    multiply<T>(vecs, {count, kTerms, weights, 1, weight_pitch, terms, term_pitch, nullptr, 0, to, to_pitch});
    return;
  }
  for (int row = 0; row < count; row += R) {
    const int first = imin(row, count - R);  // the last rows may be computed twice
    const T* w = weights + first;
    T* out = to + first * to_pitch;
    int v = 0;
    for (; v + 2 <= vecs; v += 2)
      combine_block<kTerms, R, 2>(w, weight_pitch, terms + v * L, term_pitch, out + v * L, to_pitch);
    if (v < vecs)
      combine_block<kTerms, R, 1>(w, weight_pitch, terms + v * L, term_pitch, out + v * L, to_pitch);
  }
}

// to[j][c] = sum_i weights[j][i] rows[i][c] of R weights and V vectors; `add`: added to what is there.
template <int R, int V, class T>
VITKERNELS_INLINE void sum_block(int count, const T* weights, ptrdiff_t weight_pitch, const T* rows,
                                 ptrdiff_t row_pitch, bool add, T* to, ptrdiff_t to_pitch) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[R][V] = {};
  for (int i = 0; i < count; ++i, ++weights, rows += row_pitch) {
    Vec<T> x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(rows + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = broadcast(weights[r * weight_pitch]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += weight * x[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* at = to + r * to_pitch + v * L;
      store(at, add ? load(at) + sum[r][v] : sum[r][v]);
    }
}

// to[j][c] = sum_i weights[j][i] rows[i][c]; `add`: added to what is there.
template <int kTerms, class T>
static void sum_rows(int count, int vecs, const T* weights, ptrdiff_t weight_pitch, const T* rows,
                     ptrdiff_t row_pitch, bool add, T* to, ptrdiff_t to_pitch) {
  constexpr int R = kTerms / 2, kMostVecs = 3;
  if (count > kRun) {
    multiply<T>(vecs, {kTerms, count, weights, weight_pitch, 1, rows, row_pitch, add ? to : nullptr, to_pitch,
                       to, to_pitch});
    return;
  }
  for (int groups = ceil_div(vecs, kMostVecs); groups > 0; --groups) {
    const int v = ceil_div(vecs, groups);
    for (int j = 0; j < kTerms; j += R) {
      const T* w = weights + j * weight_pitch;
      T* at = to + j * to_pitch;
      if (v == 3) sum_block<R, 3>(count, w, weight_pitch, rows, row_pitch, add, at, to_pitch);
      if (v == 2) sum_block<R, 2>(count, w, weight_pitch, rows, row_pitch, add, at, to_pitch);
      if (v == 1) sum_block<R, 1>(count, w, weight_pitch, rows, row_pitch, add, at, to_pitch);
    }
    vecs -= v;
    rows += v * kLanes<T>;
    to += v * kLanes<T>;
  }
}

// to[j][i] = sum_c rows[i][c] terms[c][j] of R rows; as many j as lanes. All lanes of `to` are written.
template <int R, class T>
static __attribute__((noinline)) void dots_block(const T* rows, ptrdiff_t row_pitch, const T* terms,
                                                 int channels, T* to, ptrdiff_t to_pitch) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[L] = {};
  for (int c = 0; c < channels; ++c, ++rows, terms += L) {
    const Vec<T> term = load(terms);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] += broadcast(rows[r * row_pitch]) * term;
  }
  transpose<T>(sum);
#pragma GCC unroll 16
  for (int j = 0; j < L; ++j) store(to + j * to_pitch, sum[j]);
}

// to[j][i] = sum_c rows[i][c] terms[c][j], a whole number of vectors of j. Rows of `to` are written up to a
// vector beyond the last i.
template <class T>
static void dots(int count, const T* rows, ptrdiff_t row_pitch, const T* terms, int lanes, int channels,
                 T* to, ptrdiff_t to_pitch, T* scratch) {
  constexpr int L = kLanes<T>;
  if (lanes > L || count < L || channels > kRun) {
    multiply<T>(lanes / L, {count, channels, rows, row_pitch, 1, terms, lanes, nullptr, 0, scratch, lanes});
    // Rows of `scratch` beyond the last are transposed with the others: whole blocks are faster.
    pack(to, to_pitch, scratch, 1, lanes, lanes, round_up_lanes<T>(count), T(1));
    return;
  }
  const auto run = [&](auto block) {
    constexpr int R = decltype(block)::value;
    for (int row = 0; row < count; row += R) {
      const int first = imin(row, count - R);  // the last rows may be computed twice
      dots_block<R>(rows + first * row_pitch, row_pitch, terms, channels, to + first, to_pitch);
    }
  };
  if (ceil_div(count, L) * (L - 1) >= count)  // one row less in each block is enough
    run(Constant<L - 1>{});
  else
    run(Constant<L>{});
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
