// Tile attention on the CPU: the pieces an attention kernel is assembled from.
//
// The forward pass keeps a tile of queries in the vector lanes (the softmax then reduces down the rows and
// never across lanes), the backward pass a tile of keys, so no matrix of probabilities is ever transposed.
// Token-dense tensors (views of an NCHW map) are loaded and stored as they lie, channel-dense ones through a
// transpose in registers.
#pragma once
#include "vitkernels/matrix_cpu.h"

namespace vitkernels::VITKERNELS_ISA {

// ---- softmax

// Weights of a softmax that are summed in one chain. None is negative, so that their roundings, each by an
// ulp of the largest, may all have one sign.
constexpr int kWeightRun = 16;

// Down the rows: s <- e^(s - max), inverse <- 1 / sum of that, lse <- max + log(sum).
template <class T, int V>
static void softmax_group(T* s, int width, int rows, T* inverse, T* lse) {
  constexpr int L = kLanes<T>;
  const Vec<T> nothing = broadcast(-static_cast<T>(__builtin_inff()));
  Vec<T> top[V], sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    top[v] = load(s + v * L);
    sum[v] = Vec<T>{};
  }
  for (int r = 1; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) top[v] = vmax(load(s + static_cast<ptrdiff_t>(r) * width + v * L), top[v]);
  for (int r = 0; r < rows;) {
    Vec<T> run[V] = {};
    for (const int end = imin(rows, r + kWeightRun); r < end; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        T* p = s + static_cast<ptrdiff_t>(r) * width + v * L;
        const Vec<T> e = exp_softmax<T>(load(p) - top[v]);
        store(p, e);
        run[v] += e;
      }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] += run[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    store(inverse + v * L, T(1) / sum[v]);
    const Vec<T> value = top[v] + log_softmax<T>(sum[v]);
    store(lse + v * L, top[v] == nothing ? top[v] : value);  // -inf, not NaN, where every logit is -inf
  }
}

template <class T>
static void softmax(T* s, int width, int vecs, int rows, T* inverse, T* lse) {
  int v = 0;
  for (; v + 2 <= vecs; v += 2)
    softmax_group<T, 2>(s + v * kLanes<T>, width, rows, inverse + v * kLanes<T>, lse + v * kLanes<T>);
  if (v < vecs)
    softmax_group<T, 1>(s + v * kLanes<T>, width, rows, inverse + v * kLanes<T>, lse + v * kLanes<T>);
}

// ---- the odd tokens of a tile

// 49 = 3 * 16 + 1: a vector for one odd token would cost a third more of everything. Such a token is computed
// on its own, with the other side's tokens in the lanes, which needs them dense in memory.
template <class T>
VITKERNELS_INLINE int odd_tokens(const Tiling<T>& tiling, bool dense) {
  const int odd = tiling.tokens % kLanes<T>;
  return dense && tiling.count == 1 && tiling.tokens > kLanes<T> && odd <= kLanes<T> / 8 ? odd : 0;
}

// dst[channel * step] = sum over tokens of m[token][channel] * x[token], tokens in the lanes.
template <class T>
static void lane_dots(T* dst, ptrdiff_t step, const T* m, ptrdiff_t channel_stride, int channels, const T* x,
                      int tokens) {
  constexpr int L = kLanes<T>;
  const int whole = tokens / L * L;
  for (int c = 0; c < channels; c += L, m += L * channel_stride) {
    Vec<T> sum[L];
    const int rows = imin(L, channels - c);
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) sum[j] = Vec<T>{};
    for (int i = 0; i < whole; i += L) {
      const Vec<T> xi = load(x + i);
      if (rows == L) {
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) sum[j] += load(m + j * channel_stride + i) * xi;
      } else {
        // Beyond the last channel its row is read again.
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) sum[j] += load(m + imin(j, rows - 1) * channel_stride + i) * xi;
      }
    }
    T total[L];
    store(total, lane_sums<T>(sum));
    for (int i = whole; i < tokens; ++i)
      for (int j = 0; j < rows; ++j) total[j] += m[j * channel_stride + i] * x[i];
    for (int j = 0; j < rows; ++j) dst[(c + j) * step] = total[j];
  }
}

// dst[token] = sum over channels of x[channel * step] * m[token][channel], tokens in the lanes.
template <class T>
static void token_dots(T* dst, const T* x, ptrdiff_t step, const T* m, ptrdiff_t channel_stride, int channels,
                       int tokens) {
  const int whole = tokens / kLanes<T> * kLanes<T>;
  multiply<T>(whole / kLanes<T>, {1, channels, x, 0, step, m, channel_stride, nullptr, 0, dst, tokens});
  for (int i = whole; i < tokens; ++i) {
    T sum = 0;
    for (int c = 0; c < channels; ++c) sum += x[c * step] * m[c * channel_stride + i];
    dst[i] = sum;
  }
}

// ---- forward

// Whether the first lanes of a tile of a matrix [channel][token] can be read and written where it lies. All
// `width` lanes of a tile are computed, also of a last tile that holds fewer tokens, but for `odd` ones that
// are computed on their own.
template <class E, class T>
VITKERNELS_INLINE bool lanes_in_place(Matrix<E> m, int lanes, int width, int odd) {
  return kSame<E, T> && m.token == 1 && (odd || lanes == width);
}

// One tile of queries: out[channel][lane]. In scratch (out_row = 0) before the division by the sum of its
// column, in place after it.
template <class T>
struct ForwardTile {
  int keys, width, odd, head_dim, value_dim;
  const T* q;     // [head_dim][q_row], times scale
  const T* bias;  // [keys][width]; null: none
  T* s;           // [keys][width]
  T* out;         // [value_dim][width]
  T *inverse, *lse;
  T* row;  // [keys], rounded up
  int q_row = width;
  ptrdiff_t out_row = 0;

  void run(Matrix<const T> k, Matrix<const T> v) const {
    const int vecs = width / kLanes<T> - (odd ? 1 : 0);
    multiply<T>(vecs, {keys, head_dim, k.data, k.token, k.channel, q, q_row, bias, width, s, width});
    softmax<T>(s, width, vecs, keys, inverse, lse);
    multiply<T>(vecs, {value_dim, keys, v.data, v.channel, v.token, s, width, nullptr, 0, out,
                       out_row ? out_row : width, nullptr, out_row ? inverse : nullptr});
    for (int i = 0; i < odd; ++i) run_odd(k, v, vecs * kLanes<T> + i);
  }

  void run_odd(Matrix<const T> k, Matrix<const T> v, int lane) const {
    const int padded = round_up_lanes<T>(keys);
    token_dots<T>(row, q + lane, q_row, k.data, k.channel, head_dim, keys);
    for (int i = 0; i < keys && bias; ++i) row[i] += bias[static_cast<ptrdiff_t>(i) * width + lane];
    T top = row[0];
    for (int i = 1; i < keys; ++i) top = row[i] > top ? row[i] : top;
    for (int i = keys; i < padded; ++i) row[i] = -static_cast<T>(__builtin_inff());
    Vec<T> sum = {};
    for (int i = 0; i < padded; i += kLanes<T>) {
      const Vec<T> e = exp_softmax<T>(load(row + i) - top);
      store(row + i, e);
      sum += e;
    }
    const T total = across<T>(sum);
    inverse[lane] = 1 / total;
    lse[lane] = top == -static_cast<T>(__builtin_inff()) ? top : top + log_softmax<T>(broadcast(total))[0];
    if (out_row)
      for (int i = 0; i < padded; i += kLanes<T>) store(row + i, load(row + i) * inverse[lane]);
    lane_dots<T>(out + lane, out_row ? out_row : width, v.data, v.channel, value_dim, row, keys);
  }
};

// ---- backward

// One tile of keys: probabilities p and logit gradients dl, [queries][width]; row r is a query. The logits
// are those of the forward pass to the last bit: the same factors, summed in the same order. lse is rounded
// by as much as it is large, which e^(logit - lse) is off by; a tile with all keys divides that out again.
// Without lse the tile has all keys and none is odd, and the softmax is taken along the rows.
template <class T>
struct BackwardTile {
  int queries, width, lanes, odd, head_dim, value_dim;
  const T* k;         // [head_dim][k_row]
  const T* v;         // [value_dim][v_row]
  const T* bias;      // [queries][width]; null: none
  const T* lse;       // [queries]; null: see above
  const T* delta;     // [queries]: sum_m p * dp - grad_lse; when `whole`, - grad_lse alone
  bool whole;         // this tile has all keys, so it finds sum_m p * dp itself
  T *p, *dl;          // [queries][width]
  T *odd_p, *odd_dl;  // [odd][queries], rounded up
  ptrdiff_t k_row = width, v_row = width;
  T* dl_sum = nullptr;  // [queries][width]: dl is added to it; null: nothing
  int vecs = width / kLanes<T> - (odd ? 1 : 0);

  // q times scale
  void run(Matrix<const T> q, Matrix<const T> grad_out) const {
    multiply<T>(vecs, {queries, head_dim, q.data, q.token, q.channel, k, k_row, bias, width, p, width});
    multiply<T>(vecs, {queries, value_dim, grad_out.data, grad_out.token, grad_out.channel, v, v_row, nullptr,
                       0, dl, width});
    const int padded = round_up_lanes<T>(queries);
    for (int i = 0; i < odd; ++i) {
      const int lane = vecs * kLanes<T> + i;
      T *pi = odd_p + i * padded, *di = odd_dl + i * padded;
      token_dots<T>(pi, k + lane, k_row, q.data, q.channel, head_dim, queries);
      token_dots<T>(di, v + lane, v_row, grad_out.data, grad_out.channel, value_dim, queries);
      for (int r = 0; r < queries && bias; ++r) pi[r] += bias[static_cast<ptrdiff_t>(r) * width + lane];
      for (int r = 0; r < padded; r += kLanes<T>) store(pi + r, exp_softmax<T>(load(pi + r) - load(lse + r)));
    }
    // A lane beyond the tile's keys holds no logit; it must not reach the sum.
    Vec<T> last = {};
    for (int i = 0; i < kLanes<T>; ++i) last[i] = (vecs - 1) * kLanes<T> + i < lanes ? T(1) : T(0);
    const IntVec<T> unused = last == T(0);
    const int computed = vecs * kLanes<T>;
    for (int r = 0; r < queries; ++r) {
      T *pr = p + static_cast<ptrdiff_t>(r) * width, *dr = dl + static_cast<ptrdiff_t>(r) * width;
      if (!lse) softmax_row(pr, computed, unused);
      const Vec<T> shift = lse ? broadcast(lse[r]) : Vec<T>{};
      Vec<T> sum = {}, weights = {};
      for (int i = 0; i < computed; i += kLanes<T>) {
        Vec<T> e = lse ? exp_softmax<T>(load(pr + i) - shift) : load(pr + i);
        if (i + kLanes<T> == computed) e = unused ? Vec<T>{} : e;
        store(pr + i, e);
        sum += e * load(dr + i);
        weights += e;
      }
      T total = whole ? across<T>(sum) : T(0), weight = whole && lse ? across<T>(weights) : T(1);
      for (int i = 0; i < odd; ++i) {
        total += odd_p[i * padded + r] * odd_dl[i * padded + r];
        weight += odd_p[i * padded + r];
      }
      const T inverse = 1 / weight;
      total *= inverse;
      // Two subtractions: where one key takes all, dp - sum is exactly 0 and only grad_lse is left.
      const Vec<T> mean = broadcast(total), rest = broadcast(delta[r]);
      for (int i = 0; i < computed; i += kLanes<T>) {
        const Vec<T> e = load(pr + i) * inverse;
        store(pr + i, e);
        store(dr + i, e * (load(dr + i) - mean - rest));
      }
      if (odd) store(dr + computed, Vec<T>{});
      for (int i = 0; i < odd; ++i) {
        T &e = odd_p[i * padded + r], &d = odd_dl[i * padded + r];
        e *= inverse;
        d = e * (d - total - delta[r]);
        dr[computed + i] = d;
      }
      if (dl_sum) {
        T* sum_r = dl_sum + static_cast<ptrdiff_t>(r) * width;
        for (int i = 0; i < width; i += kLanes<T>) store(sum_r + i, load(sum_r + i) + load(dr + i));
      }
    }
  }

  // row <- e^(row - max) / sum of that; lanes that are `unused` in the last vector take no part.
  static void softmax_row(T* row, int count, IntVec<T> unused) {
    const int last = count - kLanes<T>;
    const Vec<T> nothing = broadcast(-static_cast<T>(__builtin_inff()));
    store(row + last, unused ? nothing : load(row + last));
    Vec<T> top = load(row);
    for (int i = kLanes<T>; i < count; i += kLanes<T>) top = vmax(load(row + i), top);
    const T highest = largest<T>(top);
    Vec<T> sum = {};
    for (int i = 0; i < count; i += kLanes<T>) {
      const Vec<T> e = exp_softmax<T>(load(row + i) - highest);
      store(row + i, e);
      sum += e;
    }
    const Vec<T> inverse = broadcast(1 / across<T>(sum));
    for (int i = 0; i < count; i += kLanes<T>) store(row + i, load(row + i) * inverse);
  }

  // to[channel][lane] = sum over queries of m[query][channel] * p (or dl)[query][lane]; to's rows are `width`
  // apart unless to_row says otherwise.
  void sum_queries(Matrix<const T> m, int channels, const T* weights, const T* odd_weights, T* to,
                   ptrdiff_t to_row = 0) const {
    if (to_row == 0) to_row = width;
    const int padded = round_up_lanes<T>(queries);
    multiply<T>(vecs, {channels, m.data ? queries : 0, m.data, m.channel, m.token, weights, width, nullptr, 0,
                       to, to_row});
    for (int i = 0; i < odd; ++i)
      lane_dots<T>(to + vecs * kLanes<T> + i, to_row, m.data, m.channel, channels, odd_weights + i * padded,
                   m.data ? queries : 0);
  }
};

}  // namespace vitkernels::VITKERNELS_ISA
