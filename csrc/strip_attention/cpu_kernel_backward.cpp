// Strip attention on one core, one instruction set: backward.
//
// Floor of N queries and M keys: N M (3 r + 2 dv) multiply-adds at two vectors of them a cycle, and N M
// exponentials. The gradient of the queries takes the gradients of the logits, which those of the keys need
// anyway: the product with [k v | k] that could replace them costs another N M dv.
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
    slopes = scratch.take<T>(moments);
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

// What one tile of keys and queries is given; everything [key][query].
template <class T>
struct Tile {
  const T *x, *lse, *rest;  // [query]: the queries of an outer product, or null
  const T* k;               // [key]: its keys
  T *p, *dl;                // in: the logits where there is no outer product, and <g, v>; out: P and dS
  T* grad_x;                // [query]: the sum of dS k is added to it; an outer product alone
  int keys, width;
  bool whole;   // all keys are here, so the sum of P <g, v> is found here
  bool wanted;  // dS

  // The rounding of lse is a common factor of a query's weights; where they all are here, their sum takes it
  // out. Two subtractions: where one key takes all, <g, v> - sum is exactly 0 and only grad_lse is left.
  template <int V>
  void operator()(int vector) const {
    constexpr int L = kLanes<T>;
    const int at = vector * L;
    Vec<T> xs[V], lses[V], rests[V], sum[V], total[V], gx[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      xs[v] = x ? load(x + at + v * L) : Vec<T>{};
      lses[v] = load(lse + at + v * L);
      rests[v] = load(rest + at + v * L);
      sum[v] = total[v] = gx[v] = Vec<T>{};
    }
    T *pm = p + at, *dm = dl + at;
    for (int m = 0; m < keys; ++m, pm += width, dm += width)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<T> logit = x ? xs[v] * k[m] - lses[v] : load(pm + v * L) - lses[v];
        const Vec<T> e = exp_softmax<T>(logit);
        store(pm + v * L, e);
        if (!wanted) continue;
        if (whole) {
          sum[v] += e * load(dm + v * L);
          total[v] += e;
        } else {
          const Vec<T> d = e * (load(dm + v * L) - rests[v]);
          store(dm + v * L, d);
          if (x) gx[v] += d * k[m];
        }
      }
    if (wanted && whole) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        total[v] = T(1) / total[v];
        sum[v] *= total[v];
      }
      pm = p + at;
      dm = dl + at;
      for (int m = 0; m < keys; ++m, pm += width, dm += width)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Vec<T> e = load(pm + v * L) * total[v];
          const Vec<T> d = e * (load(dm + v * L) - sum[v] - rests[v]);
          store(pm + v * L, e);
          store(dm + v * L, d);
          if (x) gx[v] += d * k[m];
        }
    }
    if (wanted && x)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(grad_x + at + v * L, load(grad_x + at + v * L) + gx[v]);
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

// One head, ready for the products.
template <class T>
struct Head {
  Matrix<const T> k, v;
  bool expanded;
};

// lse, and delta or what is known of it before the products: rest = -grad_lse (+ <g, out>).
template <class E, class T>
void read_rows_of_queries(const Params& p, const BackwardScratch<T>& w, int64_t b, int64_t h, int start,
                          int queries) {
  const Matrix<const T> lse = tokens<const T>(p.lse, b, h), grad_lse = tokens<const T>(p.grad_lse, b, h);
  for (int i = 0; i < queries; ++i) {
    w.lse[i] = lse.data[(start + i) * lse.token];
    w.rest[i] = p.grad_lse ? -grad_lse.data[(start + i) * grad_lse.token] : T(0);
  }
  for (int i = queries; i % kLanes<T>; ++i) {  // a lane without a query has weights of 0
    w.lse[i] = static_cast<T>(__builtin_inff());
    w.rest[i] = 0;
  }
  if (!p.grad_out || w.tiles.count == 1) return;
  const Matrix<const E> g = tokens<const E>(p.grad_out, b, h), out = tokens<const E>(p.out, b, h);
  add_row_dots<E, T>(w.rest, {g.data + start * g.token, g.token, 1},
                     {out.data + start * out.token, out.token, 1}, queries, p.value_dim);
}

// grad_k of a tile of keys: the sum over queries of dS q, q with the scale in it.
template <class T>
void add_grad_k(const Params& p, const BackwardScratch<T>& w, Rows<T> q, int keys, int queries, T* to,
                bool first) {
  const int width = w.tiling.width, pitch = w.chunks.k_pitch;
  if (p.key_dim == 1) {
    lane_dots<T>(w.dots, 1, w.dl, width, keys, w.q, queries);
    for (int m = 0; m < keys; ++m) to[m] = first ? w.dots[m] : to[m] + w.dots[m];
    return;
  }
  multiply<T>(pitch / kLanes<T>,
              {keys, queries, w.dl, width, 1, q.data, q.pitch, first ? nullptr : to, pitch, to, pitch});
}

// A tile of queries against all keys.
template <class E, class T>
void backward_tile(const Params& p, const BackwardScratch<T>& w, const Head<T>& head, int64_t b, int64_t h,
                   int tile, T* grad_k, T* grad_v, bool first) {
  const int start = w.tiling.start(tile), queries = w.tiling.lanes(tile), width = w.tiling.width;
  const int vecs = ceil_div(queries, kLanes<T>), r = p.key_dim, dv = p.grad_out ? p.value_dim : 0;
  const bool outer = is_outer(p), wanted = p.grad_q || p.grad_k || p.grad_bias;
  const T scale = static_cast<T>(p.scale);

  const Matrix<const E> q = tokens<const E>(p.q, b, h);
  const Matrix<const E> qs{q.data + start * q.token, q.token, 1};
  Rows<T> q_rows{}, g_rows{};
  if (r == 1) {
    read_numbers(w.q, qs.data, qs.token, queries, scale);
  } else {
    pack(w.q, width, qs.data, 1, qs.token, r, queries, scale);
    if (p.grad_k) {
      pack(w.q_rows, w.chunks.k_pitch, qs.data, qs.token, 1, queries, r, scale);
      q_rows = {w.q_rows, w.chunks.k_pitch};
    }
  }
  if (dv) {
    const Matrix<const E> all = tokens<const E>(p.grad_out, b, h);
    const Matrix<const E> g{all.data + start * all.token, all.token, 1};
    if (wanted) pack(w.g, width, g.data, 1, g.token, dv, queries, T(1));
    if (p.grad_v) g_rows = read_rows<E, T>(g, queries, dv, T(1), w.g_rows);
  }
  read_rows_of_queries<E, T>(p, w, b, h, start, queries);
  for (int i = 0; i < r * width; ++i) w.grad_q[i] = 0;

  for (int part = 0; part < w.tiles.count; ++part) {
    const int key = w.tiles.start(part), keys = w.tiles.size(part);
    if (!outer) logits<E, T>(p, b, h, head.k, key, keys, w.q, start, queries, w.p, width);
    if (wanted)
      multiply<T>(vecs, {keys, dv, head.v.data + key * head.v.token, head.v.token, head.v.channel, w.g, width,
                         nullptr, 0, w.dl, width});
    by_twos(vecs, Tile<T>{outer ? w.q : nullptr, w.lse, w.rest, head.k.data + key, w.p, w.dl, w.grad_q, keys,
                          width, w.tiles.count == 1, wanted});
    if (p.grad_v) {
      T* to = grad_v + static_cast<ptrdiff_t>(key) * w.chunks.v_pitch;
      multiply<T>(w.chunks.v_pitch / kLanes<T>,
                  {keys, dv ? queries : 0, w.p, width, 1, g_rows.data, g_rows.pitch, first ? nullptr : to,
                   w.chunks.v_pitch, to, w.chunks.v_pitch});
    }
    if (p.grad_k)
      add_grad_k(p, w, q_rows, keys, queries, grad_k + static_cast<ptrdiff_t>(key) * w.chunks.k_pitch, first);
    if (p.grad_q && !outer)
      multiply<T>(vecs, {r, keys, head.k.data + key * head.k.token, head.k.channel, head.k.token, w.dl, width,
                         part ? w.grad_q : nullptr, width, w.grad_q, width});
    if (p.grad_bias) write_bias_gradient<E>(p, b, h, key, keys, start, queries, w.dl, width, w.ones);
  }
  if (p.grad_q) {
    const Matrix<E> to = tokens<E>(p.grad_q, b, h);
    // A row stride of 0 keeps `unpack` from transposing single numbers.
    unpack(to.data + start * to.token, r == 1 ? 0 : 1, to.token, w.grad_q, width, r, queries, w.scales);
  }
}

// The gradients of the keys [key, key + keys) of a head, from their sums.
template <class E, class T>
void write_sums(const Params& p, const Chunks<T>& chunks, int64_t b, int64_t h, T* sums, int key, int keys) {
  if (p.grad_v) {
    const Matrix<E> to = tokens<E>(p.grad_v, b, h);
    write_rows(Matrix<E>{to.data + key * to.token, to.token, 1},
               chunks.grad_v(sums) + static_cast<ptrdiff_t>(key) * chunks.v_pitch, chunks.v_pitch, keys,
               p.value_dim);
  }
  if (!p.grad_k) return;
  const Matrix<E> to = tokens<E>(p.grad_k, b, h);
  const T* from = chunks.grad_k(sums, p.keys) + static_cast<ptrdiff_t>(key) * chunks.k_pitch;
  if (p.key_dim == 1)
    for (int m = 0; m < keys; ++m) store_one(to.data + (key + m) * to.token, from[m]);
  else
    write_rows(Matrix<E>{to.data + key * to.token, to.token, 1}, from, chunks.k_pitch, keys, p.key_dim);
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
  for (int m = 0; m < keys; ++m) w.k_sums[m] = 0;
  for (int bin = 0; bin < e.bins; ++bin) {
    const T* sums = w.sums_of_g + static_cast<ptrdiff_t>(bin) * (kTerms + 1) * pitch;
    e.fill_powers(bin, kTerms, true);
    if (p.grad_v)
      multiply<T>(v_pitch / L, {keys, kTerms, e.powers, 1, e.key_pitch, sums, pitch, bin ? grad_v : nullptr,
                                v_pitch, grad_v, v_pitch});
    if (!p.grad_k) continue;
    const Vec<T> center = broadcast(e.center[bin]), inverse = broadcast(1 / e.hk);
    for (int i = 0; i < kTerms * pitch; i += L)
      store(w.slopes + i, load(sums + i) * center + load(sums + pitch + i) * inverse);
    for (int part = 0; part < w.tiles.count; ++part) {
      const int key = w.tiles.start(part), count = w.tiles.size(part);
      multiply<T>(pitch / L, {count, kTerms, e.powers + key, 1, e.key_pitch, w.slopes, pitch, nullptr, 0,
                              w.slope_rows, pitch});
      add_row_dots<T, T>(w.k_sums + key, {w.slope_rows, pitch, 1},
                         {e.rows + static_cast<ptrdiff_t>(key) * pitch, pitch, 1}, count, pitch);
    }
  }
  for (int m = 0; p.grad_k && m < keys; ++m) grad_k[m] = w.k_sums[m];
}

template <class E>
void backward_range(const Params& p, int64_t begin, int64_t end, void* memory, void* partials) {
  using T = Compute<E>;
  BackwardScratch<T> w(p, Scratch(memory));
  const Chunks<T>& chunks = w.chunks;
  for (int i = 0; i < w.tiling.width; ++i) {
    w.ones[i] = 1;
    w.scales[i] = static_cast<T>(p.scale);
  }
  Head<T> head{};
  int64_t current = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t bh = item / chunks.count, b = bh / p.heads, h = bh % p.heads;
    if (bh != current) {
      const Matrix<const E> k = tokens<const E>(p.k, b, h);
      if (p.key_dim == 1) {
        read_numbers(w.k, k.data, k.token, w.tiles.keys, T(1));
        head.k = {w.k, 1, 1};
      } else {
        head.k = readable<E, T>(k, w.tiles.keys, p.key_dim, w.k);
      }
      if constexpr (!kSame<T, double>) head.expanded = expand_head<E>(p, w, b, h);
      if (!head.expanded) head.v = readable<E, T>(tokens<const E>(p.v, b, h), w.tiles.keys, p.value_dim, w.v);
      current = bh;
    }
    T* sums = chunks.count == 1 ? w.sums : static_cast<T*>(partials) + item * chunks.size;
    const int first = static_cast<int>(item % chunks.count * chunks.each);
    const int last = imin(first + static_cast<int>(chunks.each), w.tiling.count);
    if (head.expanded) {
      const int used = w.expansion.bins * (kTerms + 1) * w.rows_pitch;
      for (int i = 0; i < used; i += kLanes<T>) store(w.sums_of_g + i, Vec<T>{});
      for (int tile = first; tile < last; ++tile)
        if constexpr (!kSame<T, double>) expanded_tile<E, T>(p, w, b, h, tile);
      expanded_sums(p, w, chunks.grad_k(sums, p.keys), chunks.grad_v(sums));
    } else {
      for (int tile = first; tile < last; ++tile)
        backward_tile<E, T>(p, w, head, b, h, tile, chunks.grad_k(sums, p.keys), chunks.grad_v(sums),
                            tile == first);
    }
    if (chunks.count == 1) write_sums<E, T>(p, chunks, b, h, sums, 0, w.tiles.keys);
  }
}

template <class E>
void reduce_range(const Params& p, int64_t begin, int64_t end, void* partials) {
  using T = Compute<E>;
  const Tiling<T> tiling(static_cast<int>(p.queries));
  const KeyTiles tiles(p.keys);
  const Chunks<T> chunks(p, tiling);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t bh = item / tiles.count, b = bh / p.heads, h = bh % p.heads;
    const int key = tiles.start(static_cast<int>(item % tiles.count)),
              keys = tiles.size(static_cast<int>(item % tiles.count));
    T* sums = static_cast<T*>(partials) + bh * chunks.count * chunks.size;
    for (int64_t c = 1; c < chunks.count; ++c) {
      T* more = sums + c * chunks.size;
      T *v = chunks.grad_v(sums) + static_cast<ptrdiff_t>(key) * chunks.v_pitch,
        *k = chunks.grad_k(sums, p.keys) + static_cast<ptrdiff_t>(key) * chunks.k_pitch;
      const ptrdiff_t v_ahead = v - sums, k_ahead = k - sums;
      for (int i = 0; p.grad_v && i < keys * chunks.v_pitch; i += kLanes<T>)
        store(v + i, load(v + i) + load(more + v_ahead + i));
      for (int i = 0; p.grad_k && i < keys * chunks.k_pitch; ++i) k[i] += more[k_ahead + i];
    }
    write_sums<E, T>(p, chunks, b, h, sums, key, keys);
  }
}

// ---- by dtype

template <class T>
int64_t items_as(const Params& p) {
  return p.batch * p.heads * Chunks<T>(p, Tiling<T>(static_cast<int>(p.queries))).count;
}
template <class T>
size_t partials_as(const Params& p) {
  const Chunks<T> chunks(p, Tiling<T>(static_cast<int>(p.queries)));
  return chunks.count == 1 ? 0 : p.batch * p.heads * chunks.count * chunks.size * sizeof(T);
}

int64_t items(const Params& p) {
  return p.dtype == DType::f64 ? items_as<double>(p) : items_as<float>(p);
}
size_t scratch(const Params& p) {
  return p.dtype == DType::f64 ? BackwardScratch<double>(p, Scratch(nullptr)).size
                               : BackwardScratch<float>(p, Scratch(nullptr)).size;
}
size_t partials(const Params& p) {
  return p.dtype == DType::f64 ? partials_as<double>(p) : partials_as<float>(p);
}
void run(const Params& p, int64_t begin, int64_t end, void* memory, void* partials) {
  switch (p.dtype) {
    case DType::f64:
      return backward_range<double>(p, begin, end, memory, partials);
    case DType::f32:
      return backward_range<float>(p, begin, end, memory, partials);
    case DType::f16:
      return backward_range<f16>(p, begin, end, memory, partials);
    case DType::bf16:
      return backward_range<bf16>(p, begin, end, memory, partials);
  }
}
int64_t reduce_items(const Params& p) {
  return p.batch * p.heads * KeyTiles(p.keys).count;
}
void reduce(const Params& p, int64_t begin, int64_t end, void* partials) {
  switch (p.dtype) {
    case DType::f64:
      return reduce_range<double>(p, begin, end, partials);
    case DType::f32:
      return reduce_range<float>(p, begin, end, partials);
    case DType::f16:
      return reduce_range<f16>(p, begin, end, partials);
    case DType::bf16:
      return reduce_range<bf16>(p, begin, end, partials);
  }
}

}  // namespace

extern const Backward kBackward;
const Backward kBackward = {items, scratch, partials, run, reduce_items, reduce};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
