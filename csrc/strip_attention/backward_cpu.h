// How the backward pass on the CPU is cut up and what memory it takes; the gradients of expansion_cpu.h's
// polynomials.
#pragma once
#include "expansion_cpu.h"

namespace vitkernels::strip_attention {
namespace VITKERNELS_ISA {
namespace {

constexpr int64_t kItems = 16;          // what a small batch is cut into
constexpr int kLeastTiles = 4;          // of queries in an item, so that its partial sums stay a small part
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
  int lanes, rows_pitch;  // of E_j side by side; of a query's [g | -delta]
  T *moments_across, *across, *sums_of_g, *slopes, *slope_rows, *norm_slopes, *rows, *k_sums;
  T *k, *v, *q, *q_rows, *g, *g_rows, *lse, *rest, *p, *dl, *dots, *grad_q, *sums, *ones, *scales;
  size_t size;

  BackwardScratch(const Params& params, Scratch scratch)
      : tiling(static_cast<int>(params.queries)),
        tiles(params.keys),
        chunks(params, tiling),
        expansion(params, true, scratch),
        sorted(tiling.width, may_expand(params), scratch),
        lanes(round_up_lanes<T>(kTerms + 1)),
        rows_pitch(expansion.pitch) {
    const size_t width = tiling.width, r = params.key_dim, dv = params.value_dim;
    const size_t used = may_expand(params) ? 1 : 0, moments = used * (kTerms + 1) * rows_pitch;
    moments_across = scratch.take<T>(used * kMaxBins * dv * lanes);
    across = scratch.take<T>(used * width * lanes);
    sums_of_g = scratch.take<T>(kMaxBins * moments);
    slopes = scratch.take<T>(kMaxBins * moments);
    slope_rows = scratch.take<T>(used * kTileKeys * rows_pitch);
    norm_slopes = scratch.take<T>(used * (width + kLanes<T>));
    rows = scratch.take<T>(used * width * rows_pitch);
    k_sums = scratch.take<T>(used * round_up_lanes<T>(tiles.keys));
    k = scratch.take<T>(copy_size<T>(tiles.keys, params.key_dim));
    v = scratch.take<T>(copy_size<T>(tiles.keys, params.value_dim));
    q = scratch.take<T>(r * width);
    q_rows = scratch.take<T>(width * chunks.k_pitch);
    g = scratch.take<T>(dv * width);
    g_rows = scratch.take<T>(width * chunks.v_pitch);
    lse = scratch.take<T>(width);
    rest = scratch.take<T>(width);
    p = scratch.take<T>(kTileKeys * width);
    dl = scratch.take<T>(kTileKeys * width);
    dots = scratch.take<T>(kTileKeys + kLanes<T>);
    grad_q = scratch.take<T>(r * width);
    sums = scratch.take<T>(chunks.count == 1 ? chunks.size : 0);
    ones = scratch.take<T>(width);
    scales = scratch.take<T>(width);
    size = scratch.used;
  }
};

// rest[query] += <g, out>
template <class E, class T>
void add_row_dots(T* rest, Matrix<const E> g, Matrix<const E> out, int queries, int channels) {
  constexpr int L = kLanes<T>;
  const int whole = channels / L * L;
  for (int i = 0; i < queries; ++i) {
    const E *a = g.data + i * g.token, *b = out.data + i * out.token;
    Vec<T> sum = {};
    for (int c = 0; c < whole; c += L) sum += load(a + c) * load(b + c);
    if (whole < channels)
      sum += load_first(a + whole, channels - whole) * load_first(b + whole, channels - whole);
    rest[i] += across<T>(sum);
  }
}

// ---- by polynomials

// Whether they cost less, in multiply-adds; what is no product counts by experience.
bool pays(const Params& p, int bins) {
  const double n = static_cast<double>(p.queries), m = static_cast<double>(p.keys), dv = p.value_dim;
  const int chunks = static_cast<int>(Chunks<float>(p, Tiling<float>(static_cast<int>(p.queries))).count);
  return (kTerms + 1) * (3 * n + (1 + 2 * chunks) * bins * m) * (dv + 8) < n * m * (2 * dv + 16);
}

template <class E, class T>
bool expand_head(const Params& p, BackwardScratch<T>& w, int64_t b, int64_t h) {
  T lowest_k, highest_k, lowest_x, highest_x;
  Expansion<T>& e = w.expansion;
  if (!may_expand(p) || !range_of_keys(w.k, w.tiles.keys, &lowest_k, &highest_k) ||
      !range_of_queries<E>(p, w.tiling, b, h, w.q, &lowest_x, &highest_x) ||
      !e.place(lowest_k, highest_k, lowest_x, highest_x) || !pays(p, e.bins))
    return false;
  e.read(tokens<const E>(p.v, b, h), w.k);
  for (int bin = 0; bin < e.bins; ++bin)
    pack(w.moments_across + static_cast<ptrdiff_t>(bin) * p.value_dim * w.lanes, w.lanes, e.moment(bin, 0), 1,
         e.pitch, p.value_dim, kTerms + 1, T(1));
  return true;
}

// The moments of a tile's g, added to sums_of_g, and grad_q.
template <class E, class T>
void expanded_tile(const Params& p, const BackwardScratch<T>& w, int64_t b, int64_t h, int tile) {
  constexpr int L = kLanes<T>;
  const Expansion<T>& e = w.expansion;
  const Sorted<T>& sorted = w.sorted;
  const int start = w.tiling.start(tile), queries = w.tiling.lanes(tile), width = w.tiling.width;
  const int pitch = w.rows_pitch, dv = p.value_dim;
  const Matrix<const E> q = tokens<const E>(p.q, b, h);
  read_numbers(w.q, q.data + start * q.token, q.token, queries, static_cast<T>(p.scale));
  sorted.sort(e, w.q, queries);
  sorted.evaluate(e, false);

  const Matrix<const E> g = tokens<const E>(p.grad_out, b, h);
  const Matrix<const T> grad_lse = tokens<const T>(p.grad_lse, b, h);
  for (int i = 0; i < queries; ++i) {
    const int query = start + sorted.order[i];
    T* row = w.rows + static_cast<ptrdiff_t>(i) * pitch;
    if (p.grad_out)
      pack(row, pitch, g.data + query * g.token, 0, 1, 1, dv, T(1));
    else
      for (int c = 0; c < dv; c += L) store(row + c, Vec<T>{});
    for (int c = dv; c < pitch; ++c) row[c] = 0;
    w.rest[i] = p.grad_lse ? grad_lse.data[query * grad_lse.token] : T(0);
  }

  T *terms = w.p, *powers = w.p + kTerms * width, *dots = w.dl;  // rows of the tile's width
  sorted.fill_terms(queries, terms, width);
  for (int bin = 0; bin < e.bins; ++bin) {
    const int first = sorted.begin[bin], end = sorted.begin[bin + 1];
    if (first == end) continue;
    multiply<T>(w.lanes / L, {end - first, dv, w.rows + static_cast<ptrdiff_t>(first) * pitch, pitch, 1,
                              w.moments_across + static_cast<ptrdiff_t>(bin) * dv * w.lanes, w.lanes, nullptr,
                              0, w.across + static_cast<ptrdiff_t>(first) * w.lanes, w.lanes});
    const T* ones = e.moment(bin, 0) + e.channels;
    for (int i = first; i < end; i += L) {
      const Vec<T> u = load(sorted.u + i);
      Vec<T> sum = {};
      for (int j = kTerms - 1; j >= 0; --j)
        sum = sum * u + T(kSeries[j]) * ones[static_cast<ptrdiff_t>(j + 1) * e.pitch];
      store(w.norm_slopes + i, sum);
    }
  }
  pack(dots, width, w.across, 1, w.lanes, kTerms + 1, queries, T(1));
  for (int i = 0; i < queries; i += L) {
    Vec<T> mean = {}, slope = {};
    for (int j = 0; j < kTerms; ++j) {
      const Vec<T> term = load(terms + j * width + i);
      mean += term * load(dots + j * width + i);
      slope += term * load(dots + (j + 1) * width + i);
    }
    const Vec<T> zeta = T(1) / load(sorted.z + i), rest = load(w.rest + i);
    const Vec<T> delta = mean * zeta - rest;
    // The sum of dS is grad_lse.
    store(w.grad_q + i, e.hk * (zeta * (slope - delta * load(w.norm_slopes + i))) + e.kc * rest);
    store(w.lse + i, -delta);
    Vec<T> power = zeta;
    const Vec<T> u = load(sorted.u + i);
    for (int j = 0; j <= kTerms; ++j, power *= u) store(powers + j * width + i, power);
  }
  const Matrix<E> to = tokens<E>(p.grad_q, b, h);
  for (int i = 0; i < queries; ++i) {
    w.rows[static_cast<ptrdiff_t>(i) * pitch + dv] = w.lse[i];
    if (p.grad_q) store_one(to.data + (start + sorted.order[i]) * to.token, w.grad_q[i] * w.scales[0]);
  }
  if (!p.grad_k && !p.grad_v) return;
  for (int bin = 0; bin < e.bins; ++bin) {
    const int first = sorted.begin[bin], count = sorted.begin[bin + 1] - first;
    T* sums = w.sums_of_g + static_cast<ptrdiff_t>(bin) * (kTerms + 1) * pitch;
    if (count)
      multiply<T>(pitch / L,
                  {kTerms + 1, count, powers + first, width, 1,
                   w.rows + static_cast<ptrdiff_t>(first) * pitch, pitch, sums, pitch, sums, pitch});
  }
}

// The gradients of the keys and values, from the sums over queries.
template <class T>
void expanded_sums(const Params& p, const BackwardScratch<T>& w, T* grad_k, T* grad_v) {
  constexpr int L = kLanes<T>;
  const Expansion<T>& e = w.expansion;
  const int pitch = w.rows_pitch, keys = w.tiles.keys, v_pitch = w.chunks.v_pitch;
  // One product for all bins; the moment after the last term meets a weight of 0.
  const int depth = e.bins * (kTerms + 1);
  e.fill_series();
  if (p.grad_v)
    multiply<T>(v_pitch / L,
                {keys, depth, e.powers, 1, e.key_pitch, w.sums_of_g, pitch, nullptr, 0, grad_v, v_pitch});
  if (!p.grad_k) return;
  for (int bin = 0; bin < e.bins; ++bin) {
    const ptrdiff_t first = static_cast<ptrdiff_t>(bin) * (kTerms + 1) * pitch;
    const T* sums = w.sums_of_g + first;
    T* slopes = w.slopes + first;
    const Vec<T> center = broadcast(e.center[bin]), inverse = broadcast(1 / e.hk);
    for (int i = 0; i < kTerms * pitch; i += L)
      store(slopes + i, load(sums + i) * center + load(sums + pitch + i) * inverse);
    for (int i = kTerms * pitch; i < (kTerms + 1) * pitch; i += L) store(slopes + i, Vec<T>{});
  }
  for (int m = 0; m < keys; ++m) w.k_sums[m] = 0;
  for (int part = 0; part < w.tiles.count; ++part) {
    const int key = w.tiles.start(part), count = w.tiles.size(part);
    multiply<T>(pitch / L, {count, depth, e.powers + key, 1, e.key_pitch, w.slopes, pitch, nullptr, 0,
                            w.slope_rows, pitch});
    add_row_dots<T, T>(w.k_sums + key, {w.slope_rows, pitch, 1},
                       {e.rows + static_cast<ptrdiff_t>(key) * pitch, pitch, 1}, count, pitch);
  }
  for (int m = 0; m < keys; ++m) grad_k[m] = w.k_sums[m];
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
