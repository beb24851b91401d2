// Attention to one channel as a polynomial: an outer product's softmax without its logits.
//
// All that a query x = scale q is asked for is e^(x k_m) of every key, and these functions of x are smooth.
// With the keys in kc +- hk and the queries of a bin in xc +- rho / hk, u = (x - xc) hk and
// kappa = (k - kc) / hk give |u kappa| <= rho and, up to a factor of the query alone, which a softmax drops,
//   e^(x k) = e^(xc k) e^(u kappa) = w_m sum_j c_j u^j kappa^j,
// a polynomial of 7 terms that is exact to float's rounding. So instead of N M weights there are
//   moments    M_j = sum_m w_m kappa_m^j [v_m | 1]          once a bin: terms M (dv + 1) multiply-adds, M
//   exponentials outputs    sum_j c_j u^j M_j, divided by its last column               terms N (dv + 1), no
//   exponential
// and backward, with zeta one over that last column and g the gradient of out,
//   E_j = <g, M_j>: from sums over j of c_j u^j come <g, out> and sum_m P kappa <g, v>, thus delta and
//   grad_q; G_j = sum_n u^j zeta [g | -delta], from which key m takes w_m sum_j c_j kappa_m^j G_j for grad_v,
//   and, the same sum over xc G_j + G_(j+1) / hk being X_m, <[v_m | 1], X_m> for grad_k.
// How many bins there are follows from the spread of a head's logits; where they are too many, where a number
// is not finite, and in float64 the weights are computed one by one.
#pragma once
#include "tiles_cpu.h"

namespace vitkernels::strip_attention {
namespace VITKERNELS_ISA {

// The polynomial of least relative error, 2.4e-8, for |t| <= kReach. A longer one would reach further, but
// where a softmax is all but decided, its alternating terms cancel: they cost e^(2 kReach) of the last bits.
constexpr int kTerms = 7, kMaxBins = 6;
constexpr float kReach = 0.5f;
constexpr float kSeries[kTerms] = {1.0000000102f,   1.0000003152f,  0.49999929275f, 0.16665617307f,
                                   0.041673389427f, 0.00841917257f, 0.00137807697f};

// Whether a head may be expanded at all. Few keys cost less one by one.
VITKERNELS_INLINE bool may_expand(const Params& p) {
  return is_outer(p) && p.dtype != DType::f64 && p.keys > 2 * kTerms;
}

template <class T>
struct Expansion {
  bool derived;
  int keys, channels, pitch, key_pitch, moment_count;
  T *kappa, *powers, *rows, *moments;           // [m]; [j][m] of one bin: w kappa^j; [m][v | 1]; [bin][j][c]
  T center[kMaxBins] = {}, top[kMaxBins] = {};  // xc, and the largest xc k, which w is relative to
  const T* k = nullptr;
  int bins = 0;
  T low = 0, bins_per_x = 0, kc = 0, hk = 0;

  // `derived`: for gradients, which take one moment more than there are terms.
  Expansion(const Params& p, bool derived, Scratch& scratch)
      : derived(derived),
        keys(static_cast<int>(p.keys)),
        channels(p.value_dim),
        pitch(round_up_lanes<T>(p.value_dim + 1)),
        key_pitch(round_up_lanes<T>(keys)),
        moment_count(kTerms + derived) {
    const size_t used = may_expand(p) ? 1 : 0;
    kappa = scratch.take<T>(used * key_pitch);
    powers = scratch.take<T>(used * moment_count * key_pitch);
    rows = scratch.take<T>(used * keys * pitch);
    moments = scratch.take<T>(used * kMaxBins * moment_count * pitch);
  }

  // From the ranges of keys and queries: the bins. False: too many, or not finite.
  bool place(T lowest_k, T highest_k, T lowest_x, T highest_x) {
    const T half = (highest_x - lowest_x) / 2;
    hk = (highest_k - lowest_k) / 2;
    kc = lowest_k + hk;
    low = lowest_x;
    const T reach = half * hk * T(1.000001);
    // A logit that is not finite fails as well.
    if (!(hk >= T(1e-30) && half <= T(1e30) && reach < T(kReach * kMaxBins))) return false;
    if (half > 0 && reach < T(1e-30)) return false;  // u would be no normal number
    bins = static_cast<int>(reach / T(kReach)) + 1;
    bins_per_x = bins > 1 ? bins / (2 * half) : T(0);
    for (int bin = 0; bin < bins; ++bin) {
      center[bin] = lowest_x + half * (2 * bin + 1) / bins;
      top[bin] = center[bin] * (center[bin] >= 0 ? highest_k : lowest_k);
    }
    return true;
  }

  int bin_of(T x) const {
    const int bin = static_cast<int>((x - low) * bins_per_x);
    return bin < 0 ? 0 : imin(bin, bins - 1);
  }
  const T* moment(int bin, int j) const {
    return moments + (static_cast<ptrdiff_t>(bin) * moment_count + j) * pitch;
  }

  template <class E>
  void read(Matrix<const E> v, const T* numbers) {
    k = numbers;
    const Vec<T> inverse = broadcast(1 / hk);
    for (int m = 0; m < keys; m += kLanes<T>) store(kappa + m, (load(k + m) - kc) * inverse);
    pack(rows, pitch, v.data, v.token, 1, keys, channels, T(1));
    if (derived) center_values();
    for (int m = 0; m < keys; ++m)
      for (int c = channels; c < pitch; ++c) rows[static_cast<ptrdiff_t>(m) * pitch + c] = c == channels;
    for (int bin = 0; bin < bins; ++bin) {
      fill_powers(bin, moment_count, false);
      multiply<T>(pitch / kLanes<T>, {moment_count, keys, powers, key_pitch, 1, rows, pitch, nullptr, 0,
                                      moments + static_cast<ptrdiff_t>(bin) * moment_count * pitch, pitch});
    }
  }

  // Less their mean, which no gradient depends on and which would cancel in all of them.
  void center_values() const {
    for (int c = 0; c < channels; c += kLanes<T>) {
      Vec<T> sum = {};
      for (int m = 0; m < keys; ++m) sum += load(rows + static_cast<ptrdiff_t>(m) * pitch + c);
      sum /= broadcast(static_cast<T>(keys));
      for (int m = 0; m < keys; ++m) {
        T* v = rows + static_cast<ptrdiff_t>(m) * pitch + c;
        store(v, load(v) - sum);
      }
    }
  }

  // powers[j][m] = w_m kappa_m^j, times c_j for a series
  void fill_powers(int bin, int count, bool series) const {
    for (int m = 0; m < keys; m += kLanes<T>) {
      const Vec<T> step = load(kappa + m);
      Vec<T> power = exp_softmax<T>(load(k + m) * center[bin] - top[bin]);
      for (int j = 0; j < count; ++j, power *= step)
        store(powers + static_cast<ptrdiff_t>(j) * key_pitch + m, series ? power * T(kSeries[j]) : power);
    }
  }
};

// The queries of a tile by bins, and what is computed of each alone. Arrays are read and written a vector
// beyond a run, in order.
template <class T>
struct Sorted {
  int *order, *bin, *begin;  // [i]: the query and its bin; runs [begin[bin], begin[bin + 1])
  T *x, *u, *z, *lse;        // z = sum_j c_j u^j M_j[1]

  Sorted(int width, bool used, Scratch& scratch) {
    const size_t count = used ? width + kLanes<T> : 0;
    order = scratch.take<int>(count);
    bin = scratch.take<int>(count);
    begin = scratch.take<int>(used ? kMaxBins + 1 : 0);
    x = scratch.take<T>(count);
    u = scratch.take<T>(count);
    z = scratch.take<T>(count);
    lse = scratch.take<T>(count);
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

  void evaluate(const Expansion<T>& e, bool wants_lse) const {
    for (int b = 0; b < e.bins; ++b) {
      const T *ones = e.moment(b, 0) + e.channels, center = e.center[b];
      for (int i = begin[b]; i < begin[b + 1]; i += kLanes<T>) {
        const Vec<T> away = load(x + i) - center, ui = away * e.hk;
        Vec<T> sum = {};
        for (int j = kTerms - 1; j >= 0; --j)
          sum = sum * ui + T(kSeries[j]) * ones[static_cast<ptrdiff_t>(j) * e.pitch];
        store(u + i, ui);
        store(z + i, sum);
        if (wants_lse) store(lse + i, e.top[b] + away * e.kc + log_softmax<T>(sum));
      }
    }
  }

  // to[j][i] = c_j u^j
  void fill_terms(int queries, T* to, int width) const {
    for (int i = 0; i < queries; i += kLanes<T>) {
      const Vec<T> ui = load(u + i);
      Vec<T> power = broadcast(T(1));
      for (int j = 0; j < kTerms; ++j, power *= ui)
        store(to + static_cast<ptrdiff_t>(j) * width + i, power * T(kSeries[j]));
    }
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
  T tops[L], bottoms[L];
  store(tops, top);
  store(bottoms, bottom);
  for (int i = 1; i < L; ++i) {
    tops[0] = tops[i] > tops[0] ? tops[i] : tops[0];
    bottoms[0] = bottoms[i] > bottoms[0] ? bottoms[i] : bottoms[0];
  }
  *highest = tops[0];
  *lowest = -bottoms[0];
  return across<T>(odd) == 0;
}

// The least and the largest key, from numbers side by side; false where one is not finite.
template <class T>
static bool range_of_keys(const T* k, int keys, T* lowest, T* highest) {
  *lowest = *highest = k[0];
  T odd = 0;
  for (int m = 0; m < keys; ++m) {
    *highest = k[m] > *highest ? k[m] : *highest;
    *lowest = k[m] < *lowest ? k[m] : *lowest;
    odd += k[m] - k[m];
  }
  return odd == 0;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
