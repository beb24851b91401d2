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
  const M* at(int token, int column) const { return data + token * row + column; }

  // Of one vector of columns: the largest element and the sum of the exponentials, or ("sum") the sum and
  // what it divides by.
  void measure_columns(int column, Vec<T>* top, Vec<T>* divisor) const {
    const int count = imin(kLanes<T>, merged - column);
    Vec<T> highest = load_or<M, T>(at(0, column), count, Vec<T>{}), sum = {};
    if (kind == Normalize::softmax)
      for (int n = 1; n < tokens; ++n) highest = vmax(load_or<M, T>(at(n, column), count, Vec<T>{}), highest);
    for (int n = 0; n < tokens;) {
      Vec<T> run = {};
      for (const int end = imin(tokens, n + kRun); n < end; ++n) {
        const Vec<T> x = load_or<M, T>(at(n, column), count, Vec<T>{});
        run += kind == Normalize::softmax ? exp_softmax<T>(x - highest) : x;
      }
      sum += run;
    }
    *top = kind == Normalize::sum ? sum : highest;
    *divisor = kind == Normalize::sum ? (sum == T(0) ? broadcast(T(1)) : sum) : sum;
  }
  // The same of one row.
  void measure_row(int token, T* top, T* divisor) const {
    const Vec<T> nothing = broadcast(-static_cast<T>(__builtin_inff()));
    Vec<T> highest = nothing, sum = {};
    for (int i = 0; i < merged; i += kLanes<T>)
      highest = vmax(load_or<M, T>(at(token, i), merged - i, nothing), highest);
    T lanes[kLanes<T>];
    store(lanes, highest);
    T most = lanes[0];
    for (int i = 1; i < kLanes<T>; ++i) most = lanes[i] > most ? lanes[i] : most;
    for (int i = 0; i < merged;) {
      Vec<T> run = {};
      for (const int end = imin(merged, i + kRun * kLanes<T>); i < end; i += kLanes<T>)
        run += exp_softmax<T>(load_or<M, T>(at(token, i), merged - i, nothing) - most);
      sum += run;
    }
    *top = most;
    *divisor = across<T>(sum);
  }

  // The weight of an element, given the largest and the divisor of its row or column.
  Vec<T> weight(Vec<T> x, Vec<T> top, Vec<T> divisor) const {
    if (kind == Normalize::none) return x;
    if (kind == Normalize::sum) return x / divisor;
    return exp_softmax<T>(x - top) / divisor;
  }

  // What the backward pass and the user see of a divisor: its logarithm, but for "sum".
  Vec<T> kept(Vec<T> top, Vec<T> divisor) const {
    return kind == Normalize::sum ? divisor : top + log_softmax<T>(divisor);
  }
};

// The weights of a mask, [token][pitch], rounded to E; the columns' measures in `tops` and `divisors`, of
// `pitch` elements each. Leaves the divisors in `kept` unless it is null.
template <class E, class M, class T>
static void fill_weights(const Mask<M, T>& mask, T* tops, T* divisors, T* kept, T* to, int pitch) {
  constexpr int L = kLanes<T>;
  for (int i = 0; i < mask.merged; i += L) {
    Vec<T> top = {}, divisor = {};
    if (mask.by_columns()) mask.measure_columns(i, &top, &divisor);
    store(tops + i, top);
    store(divisors + i, divisor);
    if (kept && mask.by_columns()) store_first(kept + i, mask.kept(top, divisor), imin(L, mask.merged - i));
  }
  for (int n = 0; n < mask.tokens; ++n, to += pitch) {
    T top = 0, divisor = 0;
    if (mask.kind == Normalize::softmax_rows) {
      mask.measure_row(n, &top, &divisor);
      if (kept) store_one(kept + n, mask.kept(broadcast(top), broadcast(divisor))[0]);
    }
    for (int i = 0; i < mask.merged; i += L) {
      const Vec<T> x = load_or<M, T>(mask.at(n, i), mask.merged - i, Vec<T>{});
      const bool columns = mask.by_columns();
      const Vec<T> weight = mask.weight(x, columns ? load(tops + i) : broadcast(top),
                                        columns ? load(divisors + i) : broadcast(divisor));
      store(to + i, rounded<E, T>(weight));
    }
  }
}

// Calls run(E{}, M{}) with the element types of the tokens and of the mask.
template <class Run>
VITKERNELS_INLINE void by_dtype(const Params& p, Run run) {
  switch (p.dtype) {
    case DType::f64:
      return run(double{}, double{});
    case DType::f32:
      return run(float{}, float{});
    case DType::f16:
      return p.mask_dtype == DType::f32 ? run(f16{}, float{}) : run(f16{}, f16{});
    case DType::bf16:
      return p.mask_dtype == DType::f32 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
  }
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::learnable_token_merge
