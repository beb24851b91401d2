// The mask on the CPU: what its rows or columns are divided by, and its weights. Compiled once per
// instruction set.
#pragma once
#include "cpu_kernel.h"
#include "vitkernels/matrix_cpu.h"

namespace vitkernels::learnable_token_merge {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

// x as it is held in E.
template <class E, class T>
VITKERNELS_INLINE Vec<T> rounded(Vec<T> x) {
  if constexpr (kSame<E, T>)
    return x;
  else
    return widen(narrow(x, E{}), E{});
}

// `count` elements, the lanes beyond them as given.
template <class M, class T>
VITKERNELS_INLINE Vec<T> load_or(const M* p, int count, Vec<T> beyond) {
  if (count >= kLanes<T>) return load(p);
  T all[kLanes<T>];
  store(all, beyond);
  T some[kLanes<T>];
  store(some, load_first(p, count));
  for (int i = 0; i < count; ++i) all[i] = some[i];
  return load(all);
}

template <class M, class T>
VITKERNELS_INLINE void store_some(M* to, Vec<T> x, int count) {
  if (count >= kLanes<T>)
    store(to, x);
  else
    store_first(to, x, count);
}

// Sums down the rows of `vecs` vectors of columns, in runs of kRun rows.
template <class T>
struct ColumnSums {
  T *run, *sum;
  int vecs, rows = 0;

  ColumnSums(T* run, T* sum, int vecs) : run(run), sum(sum), vecs(vecs) {
    for (int i = 0; i < vecs * kLanes<T>; i += kLanes<T>) {
      store(run + i, Vec<T>{});
      store(sum + i, Vec<T>{});
    }
  }
  void add(int i, Vec<T> x) const { store(run + i, load(run + i) + x); }
  void end_row(bool last) {
    if (++rows % kRun != 0 && !last) return;
    for (int i = 0; i < vecs * kLanes<T>; i += kLanes<T>) {
      store(sum + i, load(sum + i) + load(run + i));
      store(run + i, Vec<T>{});
    }
  }
};

// One mask [token][merged token] of element type M.
template <class M, class T>
struct Mask {
  const M* data;
  ptrdiff_t row;
  int tokens, merged;
  Normalize kind;

  Mask(const Params& p, int64_t batch)
      : data(static_cast<const M*>(p.g.data) + batch * p.g.stride[0]),
        row(p.g.stride[1]),
        tokens(static_cast<int>(p.tokens)),
        merged(static_cast<int>(p.merged_tokens)),
        kind(p.normalize) {}

  bool by_columns() const { return kind == Normalize::sum || kind == Normalize::softmax; }
  Vec<T> read(int token, int column, Vec<T> beyond) const {
    return load_or<M, T>(data + token * row + column, merged - column, beyond);
  }

  // The weights of columns [first, first + vecs * L) of all tokens, to[token][pitch], which the columns
  // divide. Of each column `tops` gets the largest element of a softmax and `sums` what divides: the sum of
  // exponentials, or the sum (1 for one of 0, where tops is 0). done(token, weights) follows each row.
  template <class E, class Done>
  void divide_columns(int first, int vecs, T* tops, T* sums, T* run, T* to, int pitch, Done done) const {
    constexpr int L = kLanes<T>;
    const int lanes = vecs * L;
    const bool softmax = kind == Normalize::softmax;
    for (int i = 0; softmax && i < lanes; i += L) store(tops + i, read(0, first + i, Vec<T>{}));
    for (int n = 1; softmax && n < tokens; ++n)
      for (int i = 0; i < lanes; i += L) store(tops + i, vmax(read(n, first + i, Vec<T>{}), load(tops + i)));
    ColumnSums<T> all(run, sums, vecs);
    for (int n = 0; n < tokens; ++n) {
      T* target = to + static_cast<ptrdiff_t>(n) * pitch;
      for (int i = 0; i < lanes; i += L) {
        Vec<T> x = read(n, first + i, Vec<T>{});
        if (softmax) x = exp_softmax<T>(x - load(tops + i));
        store(target + i, x);
        all.add(i, x);
      }
      all.end_row(n + 1 == tokens);
    }
    for (int i = 0; i < lanes; i += L) {
      const Vec<T> sum = load(sums + i);
      if (!softmax) store(tops + i, sum);
      if (!softmax) store(sums + i, sum == T(0) ? broadcast(T(1)) : sum);
      store(run + i, T(1) / sum);
    }
    for (int n = 0; n < tokens; ++n, to += pitch) {
      for (int i = 0; i < lanes; i += L) {
        const Vec<T> x = load(to + i);
        store(to + i, rounded<E, T>(softmax ? x * load(run + i) : x / load(sums + i)));
      }
      done(n, to);
    }
  }

  // The weights of one token, divided by their own sum or not at all. Returns the logarithm of the sum.
  template <class E>
  T divide_row(int token, T* to) const {
    constexpr int L = kLanes<T>;
    if (kind != Normalize::softmax_rows) {
      for (int i = 0; i < merged; i += L) store(to + i, rounded<E, T>(read(token, i, Vec<T>{})));
      return 0;
    }
    const Vec<T> nothing = broadcast(-static_cast<T>(__builtin_inff()));
    Vec<T> highest = nothing, sum = {};
    for (int i = 0; i < merged; i += L) highest = vmax(read(token, i, nothing), highest);
    T lanes[L];
    store(lanes, highest);
    T top = lanes[0];
    for (int i = 1; i < L; ++i) top = lanes[i] > top ? lanes[i] : top;
    for (int i = 0; i < merged;) {
      Vec<T> run = {};
      for (const int end = imin(merged, i + kRun * L); i < end; i += L) {
        const Vec<T> e = exp_softmax<T>(read(token, i, nothing) - top);
        store(to + i, e);
        run += e;
      }
      sum += run;
    }
    const T all = across<T>(sum), inverse = 1 / all;
    for (int i = 0; i < merged; i += L) store(to + i, rounded<E, T>(load(to + i) * inverse));
    return top + log_softmax<T>(broadcast(all))[0];
  }
};

// All weights of a mask, [token][pitch], rounded to E; numbers are three arrays of `pitch`. Leaves the
// divisors in `kept` unless it is null. done(token, weights) follows each row, which is in cache then.
template <class E, class M, class T, class Done>
VITKERNELS_INLINE void fill_weights(const Mask<M, T>& mask, T* numbers, T* kept, T* to, int pitch,
                                    Done done) {
  constexpr int L = kLanes<T>;
  T *tops = numbers, *sums = numbers + pitch;
  if (!mask.by_columns()) {
    for (int n = 0; n < mask.tokens; ++n) {
      T* row = to + static_cast<ptrdiff_t>(n) * pitch;
      const T log = mask.template divide_row<E>(n, row);
      if (kept) kept[n] = log;
      done(n, row);
    }
    return;
  }
  mask.template divide_columns<E>(0, pitch / L, tops, sums, numbers + 2 * pitch, to, pitch, done);
  for (int i = 0; kept && i < mask.merged; i += L) {
    const Vec<T> sum = load(sums + i);
    store_some<T, T>(kept + i, mask.kind == Normalize::sum ? sum : load(tops + i) + log_softmax<T>(sum),
                     mask.merged - i);
  }
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::learnable_token_merge
