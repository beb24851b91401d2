// Strip attention on one core, one instruction set: forward.
//
// One by one, or, for one channel and logits that do not spread too far, by expansion_cpu.h's few terms.
// Floor of N queries and M keys: N M (r + dv) multiply-adds at two vectors of them a cycle, and N M
// exponentials of about twelve such instructions each. q, k, v and out cross memory once.
#include "expansion_cpu.h"

namespace vitkernels::strip_attention {
namespace VITKERNELS_ISA {
namespace {

template <class T>
struct ForwardScratch {
  Tiling<T> tiling;
  KeyTiles tiles;
  int pitch;  // of values and of out
  T *q, *k, *v, *p, *out, *top, *sum, *rescale, *inverse;
  Expansion<T> expansion;
  Sorted<T> sorted;
  size_t size;

  ForwardScratch(const Params& params, Scratch scratch)
      : tiling(static_cast<int>(params.queries)),
        tiles(params.keys),
        pitch(round_up_lanes<T>(params.value_dim)),
        expansion(params, false, scratch),
        sorted(tiling.width, may_expand(params), scratch) {
    const size_t width = tiling.width, keys = tiles.keys;
    q = scratch.take<T>(params.key_dim * width);
    k = scratch.take<T>(copy_size<T>(tiles.keys, params.key_dim));
    v = scratch.take<T>(keys * pitch);
    p = scratch.take<T>(kTileKeys * width);
    out = scratch.take<T>(width * pitch);
    top = scratch.take<T>(width);
    sum = scratch.take<T>(sorted.pitch);
    rescale = scratch.take<T>(width);
    inverse = scratch.take<T>(width);
    size = scratch.used;
  }
};

// p <- e^(x k - top) of an outer product, which is added to sum.
template <class T, int V>
void outer_weights(const T* x, const T* top, const T* k, int keys, T* p, int width, T* sum) {
  constexpr int L = kLanes<T>;
  Vec<T> xs[V], tops[V], run[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    xs[v] = load(x + v * L);
    tops[v] = load(top + v * L);
    run[v] = Vec<T>{};
  }
  for (int m = 0; m < keys; ++m, p += width) {
    const Vec<T> key = broadcast(k[m]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<T> e = exp_softmax<T>(xs[v] * key - tops[v]);
      store(p + v * L, e);
      run[v] += e;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(sum + v * L, load(sum + v * L) + run[v]);
}

// One step of the online softmax: p <- e^(p - top) with the new top; rescale is what belongs to the old one.
template <class T, int V>
void online_weights(T* p, int width, int keys, T* top, T* sum, T* rescale) {
  constexpr int L = kLanes<T>;
  const Vec<T> nothing = broadcast(-static_cast<T>(__builtin_inff()));
  Vec<T> tops[V], run[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    tops[v] = load(top + v * L);
    run[v] = Vec<T>{};
  }
  for (int m = 0; m < keys; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) tops[v] = vmax(load(p + static_cast<ptrdiff_t>(m) * width + v * L), tops[v]);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const Vec<T> old = load(top + v * L);
    store(top + v * L, tops[v]);
    tops[v] = tops[v] == nothing ? Vec<T>{} : tops[v];  // of hidden keys alone: -inf - -inf would be NaN
    store(rescale + v * L, exp_softmax<T>(old - tops[v]));
  }
  for (int m = 0; m < keys; ++m, p += width)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<T> e = exp_softmax<T>(load(p + v * L) - tops[v]);
      store(p + v * L, e);
      run[v] += e;
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(sum + v * L, load(sum + v * L) * load(rescale + v * L) + run[v]);
}

template <class T>
struct OuterStep {
  const T *x, *top, *k;
  int keys;
  T* p;
  int width;
  T* sum;
  template <int V>
  void operator()(int v) const {
    const int at = v * kLanes<T>;
    outer_weights<T, V>(x + at, top + at, k, keys, p + at, width, sum + at);
  }
};
template <class T>
struct OnlineStep {
  T* p;
  int width, keys;
  T *top, *sum, *rescale;
  template <int V>
  void operator()(int v) const {
    const int at = v * kLanes<T>;
    online_weights<T, V>(p + at, width, keys, top + at, sum + at, rescale + at);
  }
};

// One head's keys and values, ready for the products.
template <class T>
struct Head {
  Matrix<const T> k;
  Rows<T> v;
  T highest, lowest;  // of the keys of an outer product
  bool expanded;
};

// Whether few terms cost less, in multiply-adds; what is no product counts by experience.
bool pays(const Params& p, int bins, int terms) {
  const double n = static_cast<double>(p.queries), m = static_cast<double>(p.keys), dv = p.value_dim;
  return terms * (n * (dv + 8) + bins * m * (dv + 12)) < n * m * (dv + 14);
}

template <class E, class T>
Head<T> read_head(const Params& p, ForwardScratch<T>& w, int64_t b, int64_t h) {
  const int keys = w.tiles.keys;
  const Matrix<const E> k = tokens<const E>(p.k, b, h);
  Head<T> head{};
  if (is_outer(p)) {
    read_numbers(w.k, k.data, k.token, keys, T(1));
    head.k = {w.k, 1, 1};
    [[maybe_unused]] const bool finite = range_of_keys(w.k, keys, &head.lowest, &head.highest);
    if constexpr (!kSame<T, double>) {
      Expansion<T>& e = w.expansion;
      T lowest, highest;
      if (finite && may_expand(p) && range_of_queries<E>(p, w.tiling, b, h, w.q, &lowest, &highest) &&
          e.place(w.k, head.lowest, head.highest, lowest, highest,
                  [&](int bins, int terms) { return pays(p, bins, terms); })) {
        e.read(tokens<const E>(p.v, b, h));
        head.expanded = true;
        return head;
      }
    }
  } else {
    head.k = readable<E, T>(k, keys, p.key_dim, w.k);
  }
  head.v = read_rows<E, T>(tokens<const E>(p.v, b, h), keys, p.value_dim, T(1), w.v);
  return head;
}

// The weights of one tile of keys, [key][query], not yet divided by their sum; w.rescale is what the output
// so far is to be multiplied by.
template <class E, class T>
void weights(const Params& p, const ForwardScratch<T>& w, const Head<T>& head, int64_t b, int64_t h, int key,
             int keys, int query, int queries) {
  const int vecs = ceil_div(queries, kLanes<T>), width = w.tiling.width;
  if (is_outer(p)) {
    by_twos(vecs, OuterStep<T>{w.q, w.top, head.k.data + key, keys, w.p, width, w.sum});
    return;
  }
  logits<E, T>(p, b, h, head.k, key, keys, w.q, query, queries, w.p, width);
  by_twos(vecs, OnlineStep<T>{w.p, width, keys, w.top, w.sum, w.rescale});
}

template <class T>
void start_softmax(const Params& p, const ForwardScratch<T>& w, const Head<T>& head, int vecs) {
  const Vec<T> highest = broadcast(head.highest), lowest = broadcast(head.lowest);
  const Vec<T> nothing = broadcast(-static_cast<T>(__builtin_inff()));
  for (int i = 0; i < vecs * kLanes<T>; i += kLanes<T>) {
    const Vec<T> x = load(w.q + i);
    store(w.top + i, is_outer(p) ? x * (x >= T(0) ? highest : lowest) : nothing);
    store(w.sum + i, Vec<T>{});
  }
}

// The terms of a tile's queries, [term][query], and w.inverse; w.sum is the lse.
template <int kTerms, class T>
void evaluate(const ForwardScratch<T>& w, bool wants_lse) {
  const Expansion<T>& e = w.expansion;
  const Sorted<T>& sorted = w.sorted;
  for (int bin = 0; bin < e.bins; ++bin) {
    const T *ones = e.ones + e.first_term(bin), center = e.center[bin];
    for (int i = sorted.begin[bin]; i < sorted.begin[bin + 1]; i += kLanes<T>) {
      const Vec<T> away = load(sorted.x + i) - center;
      const Terms<T, kTerms> phi(away * e.hk);
      Vec<T> even = {}, odd = {};
#pragma GCC unroll 16
      for (int j = 0; j < kTerms; ++j) {
        const Vec<T> term = phi.term(j);
        (j % 2 ? odd : even) += term * ones[j];
      }
      const Vec<T> sum = even + odd;
      const Vec<T> inverse = T(1) / sum;
#pragma GCC unroll 16
      for (int j = 0; j < kTerms; ++j)
        store(w.p + static_cast<ptrdiff_t>(j) * sorted.pitch + i, inverse * phi.term(j));
      if (wants_lse) store(w.sum + i, e.top[bin] + away * e.kc + log_softmax<T>(sum));
    }
  }
}

// A tile of queries by few terms, its numbers in w.q.
template <class E, class T>
void expanded_tile(const Params& p, const ForwardScratch<T>& w, Matrix<E> to, Matrix<T> lse, int queries) {
  const Expansion<T>& e = w.expansion;
  const Sorted<T>& sorted = w.sorted;
  sorted.sort(e, w.q, queries);
  with_terms(e.terms, [&](auto terms) { evaluate<decltype(terms)::value>(w, lse.data != nullptr); });

  T* out = w.out;
  ptrdiff_t pitch = w.pitch;
  if constexpr (kSame<E, T>)
    if (e.bins == 1 && rows_in_place<E, T>(p.value_dim)) {
      out = to.data;
      pitch = to.token;
    }
  for (int bin = 0; bin < e.bins; ++bin) {
    const int first = sorted.begin[bin], count = sorted.begin[bin + 1] - first;
    if (count)
      with_terms(e.terms, [&](auto terms) {
        combine<decltype(terms)::value>(count, w.pitch / kLanes<T>, w.p + first, sorted.pitch, e.moment(bin),
                                        e.pitch, out + first * pitch, pitch);
      });
  }
  for (int i = 0; i < queries && out == w.out; ++i)
    write_rows(Matrix<E>{to.data + sorted.order[i] * to.token, to.token, 1}, out + i * pitch, w.pitch, 1,
               p.value_dim);
  for (int i = 0; i < queries && lse.data; ++i) lse.data[sorted.order[i] * lse.token] = w.sum[i];
}

template <class E>
void forward_range(const Params& p, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  ForwardScratch<T> w(p, Scratch(memory));
  const Tiling<T>& tiling = w.tiling;
  const int dv = p.value_dim, width = tiling.width;
  Head<T> head{};
  int64_t current = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t bh = item / tiling.count, b = bh / p.heads, h = bh % p.heads;
    const int tile = static_cast<int>(item % tiling.count), start = tiling.start(tile),
              queries = tiling.lanes(tile), vecs = ceil_div(queries, kLanes<T>);
    if (bh != current) {
      expect_next<E>(p, p.v, b, h, p.keys);
      expect_next<E, true>(p, p.out, b, h, p.queries);
      head = read_head<E, T>(p, w, b, h);
    }
    current = bh;
    const Matrix<const E> q = tokens<const E>(p.q, b, h);
    const E* first = q.data + start * q.token;
    const bool there = head.expanded && tiling.count == 1;  // since their range was taken
    if (p.key_dim > 1)
      pack(w.q, width, first, 1, q.token, p.key_dim, queries, static_cast<T>(p.scale));
    else if (!there)
      read_numbers(w.q, first, q.token, queries, static_cast<T>(p.scale));

    const Matrix<E> to = tokens<E>(p.out, b, h);
    const Matrix<T> lse = p.lse ? tokens<T>(p.lse, b, h) : Matrix<T>{};
    if (head.expanded) {
      if constexpr (!kSame<T, double>)
        expanded_tile<E, T>(p, w, {to.data + start * to.token, to.token, 1},
                            {p.lse ? lse.data + start * lse.token : nullptr, lse.token, 1}, queries);
      continue;
    }
    T* out = w.out;
    ptrdiff_t pitch = w.pitch;
    if constexpr (kSame<E, T>)
      if (rows_in_place<E, T>(dv)) {
        out = to.data + start * to.token;
        pitch = to.token;
      }
    start_softmax(p, w, head, vecs);
    for (int part = 0; part < w.tiles.count; ++part) {
      const int key = w.tiles.start(part), keys = w.tiles.size(part);
      weights<E, T>(p, w, head, b, h, key, keys, start, queries);
      if (part && !is_outer(p))
        for (int i = 0; i < queries; ++i) {
          if (w.rescale[i] == T(1)) continue;
          for (int c = 0; c < w.pitch; c += kLanes<T>)
            store(out + i * pitch + c, load(out + i * pitch + c) * w.rescale[i]);
        }
      const bool last = part + 1 == w.tiles.count;
      if (last)
        for (int i = 0; i < vecs * kLanes<T>; i += kLanes<T>) store(w.inverse + i, T(1) / load(w.sum + i));
      multiply<T>(w.pitch / kLanes<T>,
                  {queries, keys, w.p, 1, width, head.v.at(key), head.v.pitch, part ? out : nullptr, pitch,
                   out, pitch, nullptr, nullptr, last ? w.inverse : nullptr});
    }
    if (out == w.out)
      write_rows(Matrix<E>{to.data + start * to.token, to.token, 1}, out, w.pitch, queries, dv);
    if (!p.lse) continue;
    for (int i = 0; i < vecs * kLanes<T>; i += kLanes<T>) {
      const Vec<T> top = load(w.top + i);
      const Vec<T> value = top + log_softmax<T>(load(w.sum + i));
      store(w.sum + i, top == -static_cast<T>(__builtin_inff()) ? top : value);
    }
    for (int i = 0; i < queries; ++i) lse.data[(start + i) * lse.token] = w.sum[i];
  }
}

int64_t items(const Params& p) {
  const int n = static_cast<int>(p.queries);
  return p.batch * p.heads * (p.dtype == DType::f64 ? Tiling<double>(n).count : Tiling<float>(n).count);
}
size_t scratch(const Params& p) {
  return p.dtype == DType::f64 ? ForwardScratch<double>(p, Scratch(nullptr)).size
                               : ForwardScratch<float>(p, Scratch(nullptr)).size;
}
void run(const Params& p, int64_t begin, int64_t end, void* memory) {
  with_dtype(p.dtype, [&](auto element) { forward_range<decltype(element)>(p, begin, end, memory); });
}

}  // namespace

extern const Forward kForward;
const Forward kForward = {items, scratch, run};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
