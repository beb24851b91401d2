// How the backward pass on the CPU is cut up and what memory it takes; the gradients of expansion_cpu.h's few
// terms.
#pragma once
#include "expansion_cpu.h"

namespace vitkernels::strip_attention {
namespace VITKERNELS_ISA {
namespace {

constexpr int64_t kItems = 16;          // what a small batch is cut into
constexpr int kLeastTiles = 5;          // of queries in an item, so that its partial sums stay a small part
constexpr int64_t kPartials = 1 << 24;  // elements of all partial sums

template <class T>
struct Chunks {
  int64_t count, each;  // chunks of a head, tiles of queries in each
  int64_t size;         // elements of the gradients of a head's keys and values
  int k_pitch, v_pitch;

  Chunks(const Params& p, const Tiling<T>& tiling)
      : k_pitch(p.key_dim == 1 ? 1 : round_up_lanes<T>(p.key_dim)), v_pitch(round_up_lanes<T>(p.value_dim)) {
    const int64_t heads = p.batch * p.heads;
    size = (p.keys * (k_pitch + v_pitch) + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    count = (kItems + heads - 1) / heads;
    const int64_t most = (tiling.count + kLeastTiles - 1) / kLeastTiles, fit = kPartials / (size * heads);
    count = count < most ? count : most;
    count = count < fit ? count : fit;
    count = count < 1 ? 1 : count;
    each = (tiling.count + count - 1) / count;
    count = (tiling.count + each - 1) / each;
  }
  T* grad_v(T* sums) const { return sums; }
  T* grad_k(T* sums, int64_t keys) const { return sums + keys * v_pitch; }
};

template <class T>
struct BackwardScratch {
  Tiling<T> tiling;
  KeyTiles tiles;
  Chunks<T> chunks;
  Expansion<T> expansion;
  Sorted<T> sorted;
  T *moments_across, *across, *dots, *weights, *sums_of_g, *sums_of_delta, *minus_delta, *sums_across,
      *k_across, *k_dots;
  T *k, *v, *q, *q_rows, *g, *g_rows, *lse, *rest, *p, *dl, *k_sums, *grad_q, *sums, *ones, *scales;
  size_t size;

  BackwardScratch(const Params& params, Scratch scratch)
      : tiling(static_cast<int>(params.queries)),
        tiles(params.keys),
        chunks(params, tiling),
        expansion(params, true, scratch),
        sorted(tiling.width, may_expand(params), scratch) {
    const size_t width = tiling.width, r = params.key_dim, dv = params.value_dim;
    const size_t used = may_expand(params) ? 1 : 0, terms = used * kMaxBins * kMostTerms,
                 lanes = round_up_lanes<T>(kMostTerms);
    moments_across = scratch.take<T>(used * kMaxBins * dv * lanes);
    across = scratch.take<T>(used * width * lanes);
    dots = scratch.take<T>(used * lanes * sorted.pitch);
    weights = scratch.take<T>(used * kMostTerms * sorted.pitch);
    sums_of_g = scratch.take<T>(terms * expansion.pitch);
    sums_of_delta = scratch.take<T>(terms);
    minus_delta = scratch.take<T>(used * sorted.pitch);
    sums_across = scratch.take<T>(used * expansion.pitch * lanes);
    k_across = scratch.take<T>(used * expansion.key_pitch * lanes);
    k_dots = scratch.take<T>(used * lanes * (expansion.key_pitch + kLanes<T>));
    k = scratch.take<T>(copy_size<T>(tiles.keys, params.key_dim));
    v = scratch.take<T>(copy_size<T>(tiles.keys, params.value_dim));
    q = scratch.take<T>(r * width);
    q_rows = scratch.take<T>(width * chunks.k_pitch);
    g = scratch.take<T>(dv * width);
    g_rows = scratch.take<T>(width * chunks.v_pitch);
    lse = scratch.take<T>(width);
    rest = scratch.take<T>(sorted.pitch);
    p = scratch.take<T>(kTileKeys * width);
    dl = scratch.take<T>(kTileKeys * width);
    k_sums = scratch.take<T>(round_up_lanes<T>(tiles.keys) + kLanes<T>);
    grad_q = scratch.take<T>(r * width + kLanes<T>);
    sums = scratch.take<T>(chunks.count == 1 ? chunks.size : 0);
    ones = scratch.take<T>(width);
    scales = scratch.take<T>(width);
    size = scratch.used;
  }
};

// sums[row] += <a, b> of rows of channels
template <class E, class T>
void add_row_dots(T* sums, Matrix<const E> a, Matrix<const E> b, int rows, int channels) {
  constexpr int L = kLanes<T>;
  const int whole = channels / L * L;
  for (int first = 0; first < rows; first += L) {
    const int count = imin(L, rows - first);
    Vec<T> sum[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      // Beyond the last row it is read again.
      const ptrdiff_t row = first + imin(i, count - 1);
      const E *x = a.data + row * a.token, *y = b.data + row * b.token;
      sum[i] = Vec<T>{};
      for (int c = 0; c < whole; c += L) sum[i] += load(x + c) * load(y + c);
      if (whole < channels)
        sum[i] += load_first(x + whole, channels - whole) * load_first(y + whole, channels - whole);
    }
    T total[L];
    store(total, lane_sums<T>(sum));
    for (int i = 0; i < count; ++i) sums[first + i] += total[i];
  }
}

// ---- by few terms

// Whether they cost less, in multiply-adds; what is no product counts by experience.
bool pays(const Params& p, int bins, int terms) {
  const double n = static_cast<double>(p.queries), m = static_cast<double>(p.keys), dv = p.value_dim;
  const int chunks = static_cast<int>(Chunks<float>(p, Tiling<float>(static_cast<int>(p.queries))).count);
  return terms * (n * (3 * dv + 24) + bins * m * ((1 + 2 * chunks) * dv + 32)) < n * m * (2 * dv + 24);
}

template <class E, class T>
bool expand_head(const Params& p, BackwardScratch<T>& w, int64_t b, int64_t h) {
  T lowest_k, highest_k, lowest_x, highest_x;
  Expansion<T>& e = w.expansion;
  if (!may_expand(p) || !range_of_keys(w.k, w.tiles.keys, &lowest_k, &highest_k) ||
      !range_of_queries<E>(p, w.tiling, b, h, w.q, &lowest_x, &highest_x) ||
      !e.place(w.k, lowest_k, highest_k, lowest_x, highest_x,
               [&](int bins, int terms) { return pays(p, bins, terms); }))
    return false;
  e.read(tokens<const E>(p.v, b, h));
  for (int bin = 0; bin < e.bins; ++bin)
    pack(w.moments_across + static_cast<ptrdiff_t>(bin) * p.value_dim * e.lanes(), e.lanes(), e.moment(bin),
         1, e.pitch, p.value_dim, e.terms, T(1));
  return true;
}

// Rows of a tile's g as they are sorted, and w.rest = grad_lse.
template <class E, class T>
Rows<T> read_sorted(const Params& p, const BackwardScratch<T>& w, int64_t b, int64_t h, int start,
                    int queries) {
  const Sorted<T>& sorted = w.sorted;
  const Matrix<const T> grad_lse = tokens<const T>(p.grad_lse, b, h);
  for (int i = 0; i < queries; ++i)
    w.rest[i] = p.grad_lse ? grad_lse.data[(start + sorted.order[i]) * grad_lse.token] : T(0);

  const int dv = p.value_dim, pitch = w.expansion.pitch;
  if (!p.grad_out) {
    for (int i = 0; i < queries * pitch; i += kLanes<T>) store(w.g_rows + i, Vec<T>{});
    return {w.g_rows, pitch};
  }
  const Matrix<const E> g = tokens<const E>(p.grad_out, b, h);
  if (w.expansion.bins == 1)
    return read_rows<E, T>({g.data + start * g.token, g.token, 1}, queries, dv, T(1), w.g_rows);
  for (int i = 0; i < queries; ++i)
    pack(w.g_rows + static_cast<ptrdiff_t>(i) * pitch, pitch, g.data + (start + sorted.order[i]) * g.token, 0,
         1, 1, dv, T(1));
  return {w.g_rows, pitch};
}

// From E_j in w.dots: grad_q in order, w.minus_delta, and w.weights[j] = zeta phi_j.
template <int kTerms, class T>
void differentiate(const BackwardScratch<T>& w) {
  const Expansion<T>& e = w.expansion;
  const Sorted<T>& sorted = w.sorted;
  for (int bin = 0; bin < e.bins; ++bin) {
    const T *ones = e.ones + e.first_term(bin), center = e.center[bin];
    for (int i = sorted.begin[bin]; i < sorted.begin[bin + 1]; i += kLanes<T>) {
      const Terms<T, kTerms> phi((load(sorted.x + i) - center) * e.hk);
      Vec<T> sum = {}, sum_slope = {}, mean = {}, slope = {};
#pragma GCC unroll 16
      for (int j = 0; j < kTerms; ++j) {
        const Vec<T> term = phi.term(j), term_slope = phi.slope(j);
        const Vec<T> dot = load(w.dots + static_cast<ptrdiff_t>(j) * sorted.pitch + i);
        sum += term * ones[j];
        sum_slope += term_slope * ones[j];
        mean += term * dot;
        slope += term_slope * dot;
      }
      const Vec<T> zeta = T(1) / sum, rest = load(w.rest + i);
      const Vec<T> delta = mean * zeta - rest;
      // The sum of dS is grad_lse.
      store(w.grad_q + i, e.hk * (zeta * (slope - delta * sum_slope)) + e.kc * rest);
      store(w.minus_delta + i, -delta);
#pragma GCC unroll 16
      for (int j = 0; j < kTerms; ++j)
        store(w.weights + static_cast<ptrdiff_t>(j) * sorted.pitch + i, zeta * phi.term(j));
    }
  }
}

// The sums over a tile's queries, added to sums_of_g and sums_of_delta, and grad_q.
template <class E, class T>
void expanded_tile(const Params& p, const BackwardScratch<T>& w, int64_t b, int64_t h, int tile) {
  constexpr int L = kLanes<T>;
  const Expansion<T>& e = w.expansion;
  const Sorted<T>& sorted = w.sorted;
  const int start = w.tiling.start(tile), queries = w.tiling.lanes(tile), dv = p.value_dim, lanes = e.lanes();
  const Matrix<const E> q = tokens<const E>(p.q, b, h);
  if (w.tiling.count > 1)  // else they are there since their range was taken
    read_numbers(w.q, q.data + start * q.token, q.token, queries, static_cast<T>(p.scale));
  sorted.sort(e, w.q, queries);
  const Rows<T> g = read_sorted<E, T>(p, w, b, h, start, queries);
  for (int bin = 0; bin < e.bins; ++bin) {
    const int first = sorted.begin[bin], count = sorted.begin[bin + 1] - first;
    if (count)
      dots(count, g.at(first), g.pitch, w.moments_across + static_cast<ptrdiff_t>(bin) * dv * lanes, lanes,
           dv, w.dots + first, sorted.pitch, w.across);
  }
  with_terms(e.terms, [&](auto terms) { differentiate<decltype(terms)::value>(w); });
  const Matrix<E> to = tokens<E>(p.grad_q, b, h);
  for (int i = 0; i < queries && p.grad_q; ++i)
    store_one(to.data + (start + sorted.order[i]) * to.token, w.grad_q[i] * w.scales[0]);

  if (!p.grad_k && !p.grad_v) return;
  for (int bin = 0; bin < e.bins; ++bin) {
    const int first = sorted.begin[bin], count = sorted.begin[bin + 1] - first;
    if (!count) continue;
    T* sums = w.sums_of_g + e.first_term(bin) * e.pitch;
    with_terms(e.terms, [&](auto terms) {
      sum_rows<decltype(terms)::value>(count, e.pitch / L, w.weights + first, sorted.pitch, g.at(first),
                                       g.pitch, true, sums, e.pitch);
    });
    T of_delta[kMostTerms + L];
    lane_dots<T>(of_delta, 1, w.weights + first, sorted.pitch, e.terms, w.minus_delta + first, count);
    for (int j = 0; j < e.terms; ++j) w.sums_of_delta[e.first_term(bin) + j] += of_delta[j];
  }
}

template <class T>
void clear_sums(const BackwardScratch<T>& w) {
  const int terms = w.expansion.bins * w.expansion.terms;
  for (int i = 0; i < terms * w.expansion.pitch; i += kLanes<T>) store(w.sums_of_g + i, Vec<T>{});
  for (int i = 0; i < terms; ++i) w.sums_of_delta[i] = 0;
}

// The gradients of the keys and values, from the sums over queries; all bins in one product.
template <class T>
void expanded_sums(const Params& p, const BackwardScratch<T>& w, T* grad_k, T* grad_v, ptrdiff_t v_pitch) {
  constexpr int L = kLanes<T>;
  const Expansion<T>& e = w.expansion;
  const int keys = e.keys, pitch = e.pitch, terms = e.bins * e.terms;
  if (p.grad_v && e.bins == 1)
    with_terms(e.terms, [&](auto terms) {
      combine<decltype(terms)::value>(keys, pitch / L, e.powers, e.key_pitch, w.sums_of_g, pitch, grad_v,
                                      v_pitch);
    });
  else if (p.grad_v)
    multiply<T>(pitch / L,
                {keys, terms, e.powers, 1, e.key_pitch, w.sums_of_g, pitch, nullptr, 0, grad_v, v_pitch});
  if (!p.grad_k) return;
  const int lanes = e.lanes(), dots_pitch = e.key_pitch + L;
  for (int bin = 0; bin < e.bins; ++bin) {
    pack(w.sums_across, lanes, w.sums_of_g + e.first_term(bin) * pitch, 1, pitch, pitch, e.terms, T(1));
    dots(keys, e.values.data, e.values.pitch, w.sums_across, lanes, pitch, w.k_dots, dots_pitch, w.k_across);
    with_terms(e.terms, [&](auto count) {
      constexpr int kTerms = decltype(count)::value;
      const T *of_delta = w.sums_of_delta + e.first_term(bin),
              *weights = e.powers + e.first_term(bin) * e.key_pitch;  // psi_0 is 1
      for (int m = 0; m < keys; m += L) {
        Vec<T> factor[kTerms], value, slope;
#pragma GCC unroll 16
        for (int j = 0; j < kTerms; ++j) factor[j] = load(w.k_dots + j * dots_pitch + m) + of_delta[j];
        sum_key_terms<kTerms, T>(load(e.kappa + m), factor, &value, &slope);
        const Vec<T> sum = load(weights + m) * (value * e.center[bin] + slope * (1 / e.hk));
        store(w.k_sums + m, bin ? load(w.k_sums + m) + sum : sum);
      }
    });
  }
  for (int m = 0; m < keys; ++m) grad_k[m] = w.k_sums[m];
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
