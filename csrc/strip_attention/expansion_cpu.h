// Attention to one channel by few terms: an outer product's softmax without its logits.
//
// All that a query x = scale q is asked for is e^(x k_m) of every key, and these functions of x are smooth.
// With the keys in kc +- hk and the queries of a bin in xc +- rho / hk, u = (x - xc) hk and
// kappa = (k - kc) / hk give |u kappa| <= rho and, up to a factor of the query alone, which a softmax drops,
//   e^(x k) = e^(xc k) e^(u kappa) = w_m sum_j phi_j(u) psi_j(kappa),
// eight or ten terms (series_cpu.h). So instead of N M weights there are
//   moments  M_j = sum_m w_m psi_j(kappa_m) [v_m | 1]       once a bin: M (dv + 1) multiply-adds a term
//   outputs  sum_j phi_j(u) M_j, divided by its last column               N (dv + 1) a term, no exponential
// and backward, with zeta one over that last column and g the gradient of out,
//   E_j = <g, M_j>: from sums over j of phi_j E_j and phi_j' E_j come <g, out> and sum_m P kappa <g, v>, thus
//   delta and grad_q; G_j = sum_n phi_j zeta [g | -delta], from which key m takes w_m sum_j psi_j(kappa_m)
//   G_j for grad_v and, with w_m (xc psi_j + psi_j' / hk) in place of w_m psi_j, X_m for grad_k = <[v_m | 1],
//   X_m>, where <[v_m | 1], G_j> comes first.
// Most heads of a network need one bin. Where a head's logits spread so far that there are too many, where a
// number is not finite, and in float64 the weights are computed one by one.
#pragma once
#include "products_cpu.h"
#include "series_cpu.h"

namespace vitkernels::strip_attention {
namespace VITKERNELS_ISA {

constexpr int kMaxBins = 4;
constexpr float kTame = 2;  // see ratio_of_ends()
constexpr float kFar = Series<kMostTerms>::kReach;

// Whether a head may be expanded at all. Few keys cost less one by one.
VITKERNELS_INLINE bool may_expand(const Params& p) {
  return is_outer(p) && p.dtype != DType::f64 && p.keys > kMostTerms;
}

template <class T>
struct Expansion {
  bool derived;
  int keys, channels, pitch, key_pitch;
  T *kappa, *weight;                          // [m]; [m], of the bin at hand
  T* powers;                                  // [bin][j][m]: w psi_j
  T *copied, *moments;                        // [m][c]; [bin][j][c]
  T ones[kMaxBins * kMostTerms + kLanes<T>];  // the moments' last column
  Rows<T> values{};
  T center[kMaxBins] = {}, top[kMaxBins] = {};  // xc, and the largest xc k, which w is relative to
  const T* k = nullptr;
  int bins = 0, terms = 0;
  T low = 0, bins_per_x = 0, kc = 0, hk = 0;

  // `derived`: for gradients.
  Expansion(const Params& p, bool derived, Scratch& scratch)
      : derived(derived),
        keys(static_cast<int>(p.keys)),
        channels(p.value_dim),
        pitch(round_up_lanes<T>(p.value_dim)),
        key_pitch(round_up_lanes<T>(keys)) {
    const size_t used = may_expand(p) ? 1 : 0, of_bin = used * kMostTerms * key_pitch;
    kappa = scratch.take<T>(used * key_pitch);
    weight = scratch.take<T>(used * key_pitch);
    powers = scratch.take<T>(kMaxBins * of_bin);
    copied = scratch.take<T>(used * keys * pitch);
    moments = scratch.take<T>(used * kMaxBins * kMostTerms * pitch);
  }

  // From the ranges of keys and queries: the bins, the terms and the powers. False: too many, not finite, or
  // pays(bins, terms) is false. `numbers` are the keys, zeros beyond them up to a whole vector.
  template <class Pays>
  bool place(const T* numbers, T lowest_k, T highest_k, T lowest_x, T highest_x, Pays pays) {
    const T half = (highest_x - lowest_x) / 2;
    k = numbers;
    hk = (highest_k - lowest_k) / 2;
    kc = lowest_k + hk;
    low = lowest_x;
    const T reach = half * hk * T(1.000001);
    // A logit that is not finite fails as well.
    if (!(hk >= T(1e-30) && half <= T(1e30) && reach < T(kFar * kMaxBins))) return false;
    if (half > 0 && reach < T(1e-30)) return false;  // u would be no normal number
    for (int m = 0; m < key_pitch; m += kLanes<T>) store(kappa + m, (load(k + m) - kc) * (1 / hk));
    for (int m = keys; m < key_pitch; ++m) kappa[m] = 0;
    bins = static_cast<int>(reach / T(kFar)) + 1;
    while (bins <= kMaxBins) {
      terms = reach < bins * T(Series<kFewTerms>::kReach) ? kFewTerms : kMostTerms;
      if (!pays(bins, terms)) return false;
      bins_per_x = bins > 1 ? bins / (2 * half) : T(0);
      T ratio = 1;
      for (int bin = 0; bin < bins && ratio <= T(kTame); ++bin) {
        center[bin] = lowest_x + half * (2 * bin + 1) / bins;
        top[bin] = center[bin] * (center[bin] >= 0 ? highest_k : lowest_k);
        with_terms(terms, [&](auto count) {
          constexpr int kTerms = decltype(count)::value;
          fill_powers<kTerms>(bin);
          ratio = ratio_of_ends<kTerms>(bin, half / bins * hk);
        });
      }
      if (ratio <= T(kTame)) return true;
      if (!(ratio < T(1e30))) return false;
      // Parts of a bin have ratios whose product is the bin's: no fewer bins will do.
      bins = 1 + static_cast<int>(bins * log_softmax<T>(broadcast(ratio))[0] / T(0.6931));
    }
    return false;
  }

  // The terms of a weight round like e^|u kappa|, the weight is e^(u kappa): where a softmax is all but
  // decided against most keys, nothing would be left of them. At the two ends of a bin, between which it is
  // less, the sums of all weights less kc's must not differ by more than kTame. This is the larger by the
  // smaller, for ends at -u and u.
  template <int kTerms>
  T ratio_of_ends(int bin, T u) const {
    Vec<T> ends = broadcast(u), sum = {};
    ends[0] = -u;
    const Terms<T, kTerms> phi(ends);
#pragma GCC unroll 16
    for (int j = 0; j < kTerms; ++j) sum += phi.term(j) * ones[first_term(bin) + j];
    return sum[0] > sum[1] ? sum[0] / sum[1] : sum[1] / sum[0];
  }

  int bin_of(T x) const {
    const int bin = static_cast<int>((x - low) * bins_per_x);
    return bin < 0 ? 0 : imin(bin, bins - 1);
  }
  ptrdiff_t first_term(int bin) const { return static_cast<ptrdiff_t>(bin) * terms; }
  int lanes() const { return round_up_lanes<T>(terms); }  // of terms side by side
  const T* moment(int bin) const { return moments + first_term(bin) * pitch; }

  template <class E>
  void read(Matrix<const E> v) {
    if (derived)
      values = centered(v);
    else
      values = read_rows<E, T>(v, keys, channels, T(1), copied);
    with_terms(terms, [&](auto count) {
      constexpr int kTerms = decltype(count)::value;
      for (int bin = 0; bin < bins; ++bin)
        sum_rows<kTerms>(keys, pitch / kLanes<T>, powers + first_term(bin) * key_pitch, key_pitch,
                         values.data, values.pitch, false, moments + first_term(bin) * pitch, pitch);
    });
  }

  // Less their mean, which no gradient depends on and which would cancel in all of them.
  template <class E>
  Rows<T> centered(Matrix<const E> v) const {
    constexpr int kTogether = 4;
    const Rows<T> rows = read_rows<E, T>(v, keys, channels, T(1), copied);
    // Rows of one head may lie a power of two apart, where few fit in the nearest cache: read once, in order.
    for (int c = 0; c < pitch; c += kTogether * kLanes<T>) {
      const int vecs = imin(kTogether, (pitch - c) / kLanes<T>);
      if (vecs == kTogether)
        less_mean<kTogether>(rows, c);
      else
        for (int v = 0; v < vecs; ++v) less_mean<1>(rows, c + v * kLanes<T>);
    }
    return {copied, pitch};
  }

  // The columns [c, c + V vectors) of `copied`: those of `rows` less their mean.
  template <int V>
  void less_mean(Rows<T> rows, int c) const {
    constexpr int L = kLanes<T>, kSums = 2;
    Vec<T> sum[kSums][V] = {};  // of even and of odd rows
    T* to = copied + c;
    int m = 0;
    for (; m + kSums <= keys; m += kSums)
#pragma GCC unroll 2
      for (int i = 0; i < kSums; ++i, to += pitch) add_row<V>(rows.at(m + i) + c, to, sum[i]);
    if (m < keys) add_row<V>(rows.at(m) + c, to, sum[0]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[0][v] = (sum[0][v] + sum[1][v]) * (T(1) / static_cast<T>(keys));
    to = copied + c;
    for (m = 0; m < keys; ++m, to += pitch)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(to + v * L, load(to + v * L) - sum[0][v]);
  }

  // to = from, and added to the sum
  template <int V>
  VITKERNELS_INLINE void add_row(const T* from, T* to, Vec<T> (&sum)[V]) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<T> x = load(from + v * kLanes<T>);
      store(to + v * kLanes<T>, x);
      sum[v] += x;
    }
  }

  // to[j][m] = w_m psi_j, and their sums
  template <int kTerms>
  void fill_powers(int bin) {
    T* to = powers + first_term(bin) * key_pitch;
    for (int m = 0; m < key_pitch; m += kLanes<T>)
      store(weight + m, exp_softmax<T>(load(k + m) * center[bin] - top[bin]));
    for (int m = keys; m < key_pitch; ++m) weight[m] = 0;
    Vec<T> sum[kTerms] = {};
    for (int m = 0; m < key_pitch; m += kLanes<T>) {
      const KeyTerms<T, kTerms> psi(load(kappa + m));
      const Vec<T> w = load(weight + m);
#pragma GCC unroll 16
      for (int j = 0; j < kTerms; ++j) {
        const Vec<T> power = w * psi.term(j);
        store(to + static_cast<ptrdiff_t>(j) * key_pitch + m, power);
        sum[j] += power;
      }
    }
#pragma GCC unroll 16
    for (int first = 0; first < kTerms; first += kLanes<T>) {
      Vec<T> block[kLanes<T>];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes<T>; ++j) block[j] = first + j < kTerms ? sum[first + j] : Vec<T>{};
      store(ones + first_term(bin) + first, lane_sums<T>(block));
    }
  }
};

// The queries of a tile by bins. Arrays are read and written a vector beyond a run, in order; so rows of a
// tile's numbers are `pitch` apart.
template <class T>
struct Sorted {
  int pitch;
  int *order, *bin, *begin;  // [i]: the query and its bin; runs [begin[bin], begin[bin + 1])
  T* x;

  Sorted(int width, bool used, Scratch& scratch) : pitch(width + kLanes<T>) {
    const size_t count = used ? pitch : 0;
    order = scratch.take<int>(count);
    bin = scratch.take<int>(count);
    begin = scratch.take<int>(used ? kMaxBins + 1 : 0);
    x = scratch.take<T>(count);
  }

  void sort(const Expansion<T>& e, const T* from, int queries) const {
    for (int b = 0; b <= e.bins; ++b) begin[b] = 0;
    if (e.bins == 1) {
      for (int i = 0; i < queries; ++i) order[i] = i;
      for (int i = 0; i < queries; i += kLanes<T>) store(x + i, load(from + i));
      begin[1] = queries;
    } else {
      for (int i = 0; i < queries; ++i) ++begin[bin[i] = e.bin_of(from[i])];
      for (int b = 0, sum = 0; b <= e.bins; ++b) {
        const int count = begin[b];
        begin[b] = sum;
        sum += count;
      }
      for (int i = 0; i < queries; ++i) {
        const int place = begin[bin[i]]++;
        order[place] = i;
        x[place] = from[i];
      }
      for (int b = e.bins; b > 0; --b) begin[b] = begin[b - 1];
      begin[0] = 0;
    }
    for (int i = queries; i < queries + kLanes<T>; ++i) x[i] = x[queries - 1];
  }
};

// The range of a head's scaled queries; false where one is not finite. `tile` holds a tile of numbers.
template <class E, class T>
static bool range_of_queries(const Params& p, const Tiling<T>& tiling, int64_t b, int64_t h, T* tile,
                             T* lowest, T* highest) {
  constexpr int L = kLanes<T>;
  const Matrix<const E> q = tokens<const E>(p.q, b, h);
  Vec<T> top = broadcast(-static_cast<T>(__builtin_inff())), bottom = top, odd = {};
  for (int i = 0; i < tiling.count; ++i) {
    const int count = tiling.lanes(i);
    read_numbers(tile, q.data + tiling.start(i) * q.token, q.token, count, static_cast<T>(p.scale));
    for (int lane = count; lane % L; ++lane) tile[lane] = tile[count - 1];
    for (int lane = 0; lane < count; lane += L) {
      const Vec<T> x = load(tile + lane);
      top = vmax(x, top);
      bottom = vmax(-x, bottom);
      odd += x - x;
    }
  }
  *highest = largest<T>(top);
  *lowest = -largest<T>(bottom);
  return across<T>(odd) == 0;
}

// The least and the largest key, from numbers side by side; false where one is not finite.
template <class T>
static bool range_of_keys(const T* k, int keys, T* lowest, T* highest) {
  constexpr int L = kLanes<T>;
  T low = k[0], high = k[0], odd = 0;
  int m = 0;
  if (keys >= L) {
    Vec<T> tops = load(k), bottoms = -tops, odds = {};
    for (; m + L <= keys; m += L) {
      const Vec<T> x = load(k + m);
      tops = vmax(x, tops);
      bottoms = vmax(-x, bottoms);
      odds += x - x;
    }
    high = largest<T>(tops);
    low = -largest<T>(bottoms);
    odd = across<T>(odds);
  }
  for (; m < keys; ++m) {
    high = k[m] > high ? k[m] : high;
    low = k[m] < low ? k[m] : low;
    odd += k[m] - k[m];
  }
  *lowest = low;
  *highest = high;
  return odd == 0;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
