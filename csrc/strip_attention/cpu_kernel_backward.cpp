// Strip attention on one core, one instruction set: backward.
//
// Floor of N queries and M keys: N M (3 r + 2 dv) multiply-adds at two vectors of them a cycle, and N M
// exponentials. The gradient of the queries takes the gradients of the logits, which those of the keys need
// anyway: the product with [k v | k] that could replace them costs another N M dv.
#include "backward_cpu.h"

namespace vitkernels::strip_attention {
namespace VITKERNELS_ISA {
namespace {

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
    lane_dots<T>(w.k_sums, 1, w.dl, width, keys, w.q, queries);
    for (int m = 0; m < keys; ++m) to[m] = first ? w.k_sums[m] : to[m] + w.k_sums[m];
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
void write_sums(const Params& p, const Chunks<T>& chunks, int64_t b, int64_t h, T* sums, int key, int keys,
                bool grad_v) {
  if (grad_v) {
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

template <class E>
void backward_range(const Params& p, int64_t begin, int64_t end, void* memory, void* partials) {
  using T = Compute<E>;
  BackwardScratch<T> w(p, Scratch(memory));
  const Chunks<T>& chunks = w.chunks;
  for (int i = 0; i < w.tiling.width; ++i) {
    w.ones[i] = 1;
    w.scales[i] = static_cast<T>(p.scale);
  }
  const bool in_place = p.grad_v && chunks.count == 1 && rows_in_place<E, T>(p.value_dim);
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
    if (chunks.count == 1) {
      expect_next<E>(p, p.v, b, h, p.keys);
      expect_next<E>(p, p.grad_out, b, h, p.queries);
      if (in_place) expect_next<E, true>(p, p.grad_v, b, h, p.keys);
    }
    T* sums = chunks.count == 1 ? w.sums : static_cast<T*>(partials) + item * chunks.size;
    const int first = static_cast<int>(item % chunks.count * chunks.each);
    const int last = imin(first + static_cast<int>(chunks.each), w.tiling.count);
    if (head.expanded) {
      clear_sums(w);
      for (int tile = first; tile < last; ++tile)
        if constexpr (!kSame<T, double>) expanded_tile<E, T>(p, w, b, h, tile);
      T* grad_v = chunks.grad_v(sums);
      ptrdiff_t pitch = chunks.v_pitch;
      if constexpr (kSame<E, T>)
        if (in_place) {
          const Matrix<E> to = tokens<E>(p.grad_v, b, h);
          grad_v = to.data;
          pitch = to.token;
        }
      expanded_sums(p, w, chunks.grad_k(sums, p.keys), grad_v, pitch);
    } else {
      for (int tile = first; tile < last; ++tile)
        backward_tile<E, T>(p, w, head, b, h, tile, chunks.grad_k(sums, p.keys), chunks.grad_v(sums),
                            tile == first);
    }
    if (chunks.count == 1)
      write_sums<E, T>(p, chunks, b, h, sums, 0, w.tiles.keys, p.grad_v && !(head.expanded && in_place));
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
    write_sums<E, T>(p, chunks, b, h, sums, key, keys, static_cast<bool>(p.grad_v));
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
  with_dtype(p.dtype,
             [&](auto element) { backward_range<decltype(element)>(p, begin, end, memory, partials); });
}
int64_t reduce_items(const Params& p) {
  return p.batch * p.heads * KeyTiles(p.keys).count;
}
void reduce(const Params& p, int64_t begin, int64_t end, void* partials) {
  with_dtype(p.dtype, [&](auto element) { reduce_range<decltype(element)>(p, begin, end, partials); });
}

}  // namespace

extern const Backward kBackward;
const Backward kBackward = {items, scratch, partials, run, reduce_items, reduce};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
