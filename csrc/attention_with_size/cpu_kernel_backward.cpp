// Proportional attention on one core, one instruction set: backward.
//
// Floor of N queries and M keys: N M (3 d + 2 dv) multiply-adds at two vectors of them a cycle, and N M
// exponentials. An item is a whole head, so that the gradients of keys and values are added up in one place;
// tiles of queries go by.
//
// The weights of a tile of queries with all keys are kept, so that their own sum divides them: lse grows with
// the tokens that a sequence had before it was merged, and its rounding would be in every weight.
#include "rows_cpu.h"

namespace vitkernels::attention_with_size {
namespace VITKERNELS_ISA {
namespace {

template <class T>
struct BackwardScratch {
  Tiling<T> tiling;
  KeyTiles tiles;
  int k_pitch, v_pitch;
  T *sizes, *k, *v, *grad_k, *grad_v;                              // of all keys
  T *q, *g, *q_rows, *g_rows, *lse, *rest, *total, *sum, *grad_q;  // of a tile of queries
  T *p, *ds;  // of all keys and a tile of queries, [key][query]
  size_t size;

  BackwardScratch(const Params& params, Scratch scratch)
      : tiling(static_cast<int>(params.queries)),
        tiles(params.keys),
        k_pitch(round_up_lanes<T>(params.key_dim)),
        v_pitch(round_up_lanes<T>(params.value_dim)) {
    const size_t width = tiling.width, keys = tiles.keys;
    sizes = scratch.take<T>(round_up_lanes<T>(tiles.keys));
    k = scratch.take<T>(keys * k_pitch);
    v = scratch.take<T>(keys * v_pitch);
    grad_k = scratch.take<T>(keys * k_pitch);
    grad_v = scratch.take<T>(keys * v_pitch);
    q = scratch.take<T>(params.key_dim * width);
    g = scratch.take<T>(params.value_dim * width);
    q_rows = scratch.take<T>(width * k_pitch);
    g_rows = scratch.take<T>(width * v_pitch);
    lse = scratch.take<T>(width);
    rest = scratch.take<T>(width);
    total = scratch.take<T>(width);
    sum = scratch.take<T>(width);
    grad_q = scratch.take<T>(width * k_pitch);
    p = scratch.take<T>(keys * width);
    ds = scratch.take<T>(keys * width);
    size = scratch.used;
  }
};

// p <- e^(p + bias - lse) with one bias a key, total += that, sum += that times <g, v>.
template <class T, int V>
void exponentiate(T* p, const T* ds, int width, int keys, const T* bias, const T* lse, T* total, T* sum) {
  constexpr int L = kLanes<T>;
  Vec<T> lses[V], totals[V], sums[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    lses[v] = load(lse + v * L);
    totals[v] = load(total + v * L);
    sums[v] = load(sum + v * L);
  }
  for (int m = 0; m < keys;) {
    Vec<T> run[V] = {}, run_sums[V] = {};
    for (const int end = imin(keys, m + kWeightRun); m < end; ++m, p += width, ds += width)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Vec<T> e = exp_softmax<T>((load(p + v * L) + bias[m]) - lses[v]);
        store(p + v * L, e);
        run[v] += e;
        run_sums[v] += e * load(ds + v * L);
      }
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      totals[v] += run[v];
      sums[v] += run_sums[v];
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    store(total + v * L, totals[v]);
    store(sum + v * L, sums[v]);
  }
}

// p <- P = p inverse, ds <- dS = P (<g, v> - mean - rest). Two subtractions: where one key takes all,
// <g, v> - mean is exactly 0 and only grad_lse is left.
template <class T, int V>
void finish(T* p, T* ds, int width, int keys, const T* inverse, const T* mean, const T* rest) {
  constexpr int L = kLanes<T>;
  Vec<T> inverses[V], means[V], rests[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    inverses[v] = load(inverse + v * L);
    means[v] = load(mean + v * L);
    rests[v] = load(rest + v * L);
  }
  for (int m = 0; m < keys; ++m, p += width, ds += width)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Vec<T> e = load(p + v * L) * inverses[v];
      store(p + v * L, e);
      store(ds + v * L, e * (load(ds + v * L) - means[v] - rests[v]));
    }
}

// lse and -grad_lse of a tile of queries, and sums of nothing yet.
template <class T>
void read_numbers(const Params& p, const BackwardScratch<T>& w, int64_t b, int64_t h, int start,
                  int queries) {
  const Matrix<const T> lse = tokens<const T>(p.lse, b, h, start);
  const Matrix<const T> grad_lse = tokens<const T>(p.grad_lse, b, h, p.grad_lse ? start : 0);
  for (int i = 0; i < round_up_lanes<T>(queries); ++i) {
    const bool real = i < queries;  // a lane without a query has weights of 0
    w.lse[i] = real ? lse.data[i * lse.token] : static_cast<T>(__builtin_inff());
    w.rest[i] = real && p.grad_lse ? -grad_lse.data[i * grad_lse.token] : T(0);
    w.total[i] = w.sum[i] = 0;
  }
}

struct One {
  static constexpr int value = 1;
};
struct Two {
  static constexpr int value = 2;
};
// Calls run(One{} or Two{}, first lane) on the vectors of a tile, two at a time.
template <class T, class Run>
VITKERNELS_INLINE void by_twos(int vecs, Run run) {
  int v = 0;
  for (; v + 2 <= vecs; v += 2) run(Two{}, v * kLanes<T>);
  if (v < vecs) run(One{}, v * kLanes<T>);
}

// A tile of queries against all keys.
template <class E, class T>
void backward_tile(const Params& p, const BackwardScratch<T>& w, int64_t b, int64_t h, int tile) {
  constexpr int L = kLanes<T>;
  const int start = w.tiling.start(tile), queries = w.tiling.lanes(tile), width = w.tiling.width;
  const int vecs = ceil_div(queries, L), d = p.key_dim, dv = p.grad_out ? p.value_dim : 0;
  const bool wanted = p.grad_q || p.grad_k;
  const T scale = static_cast<T>(p.scale);
  const Matrix<const E> q = tokens<const E>(p.q, b, h, start);
  pack(w.q, width, q.data, 1, q.token, d, queries, scale);
  if (p.grad_k) read_rows<E, T>(q, queries, d, scale, w.q_rows);
  if (dv) {
    const Matrix<const E> g = tokens<const E>(p.grad_out, b, h, start);
    if (wanted) pack(w.g, width, g.data, 1, g.token, dv, queries, T(1));
    read_rows<E, T>(g, queries, dv, T(1), w.g_rows);
  }
  read_numbers<T>(p, w, b, h, start, queries);

  for (int part = 0; part < w.tiles.count; ++part) {
    const int key = w.tiles.start(part), count = w.tiles.size(part);
    const ptrdiff_t at = static_cast<ptrdiff_t>(key) * width;
    T *weights = w.p + at, *ds = w.ds + at;
    multiply<T>(vecs,
                {count, d, w.k + static_cast<ptrdiff_t>(key) * w.k_pitch, w.k_pitch, 1, w.q, width, nullptr,
                 0, weights, width},
                logit_run(p.queries));
    if (wanted)
      multiply<T>(vecs, {count, dv, w.v + static_cast<ptrdiff_t>(key) * w.v_pitch, w.v_pitch, 1, w.g, width,
                         nullptr, 0, ds, width});
    by_twos<T>(vecs, [&](auto two, int i) {
      exponentiate<T, decltype(two)::value>(weights + i, wanted ? ds + i : weights + i, width, count,
                                            w.sizes + key, w.lse + i, w.total + i, w.sum + i);
    });
  }
  for (int i = 0; i < vecs * L; i += L) {
    const Vec<T> total = load(w.total + i), divisor = total == T(0) ? broadcast(T(1)) : total;
    store(w.total + i, T(1) / divisor);
    store(w.sum + i, load(w.sum + i) / divisor);
  }

  for (int part = 0; part < w.tiles.count; ++part) {
    const int key = w.tiles.start(part), count = w.tiles.size(part);
    const ptrdiff_t at = static_cast<ptrdiff_t>(key) * width;
    T *weights = w.p + at, *ds = w.ds + at;
    by_twos<T>(vecs, [&](auto two, int i) {
      finish<T, decltype(two)::value>(weights + i, ds + i, width, count, w.total + i, w.sum + i, w.rest + i);
    });
    if (p.grad_v) {
      T* to = w.grad_v + static_cast<ptrdiff_t>(key) * w.v_pitch;
      multiply<T>(w.v_pitch / L, {count, dv ? queries : 0, weights, width, 1, w.g_rows, w.v_pitch,
                                  tile ? to : nullptr, w.v_pitch, to, w.v_pitch});
    }
    if (p.grad_k) {
      T* to = w.grad_k + static_cast<ptrdiff_t>(key) * w.k_pitch;
      multiply<T>(w.k_pitch / L, {count, queries, ds, width, 1, w.q_rows, w.k_pitch, tile ? to : nullptr,
                                  w.k_pitch, to, w.k_pitch});
    }
    if (p.grad_q)
      multiply<T>(w.k_pitch / L, {queries, count, ds, 1, width, w.k + static_cast<ptrdiff_t>(key) * w.k_pitch,
                                  w.k_pitch, part ? w.grad_q : nullptr, w.k_pitch, w.grad_q, w.k_pitch});
  }
  if (p.grad_q) write_rows<E, T>(tokens<E>(p.grad_q, b, h, start), w.grad_q, w.k_pitch, queries, d, scale);
}

template <class E>
void backward_range(const Params& p, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  const BackwardScratch<T> w(p, Scratch(memory));
  const int keys = w.tiles.keys;
  int64_t sized = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.heads, h = item % p.heads;
    if (b != sized) read_sizes(p.size, b, keys, w.sizes);
    sized = b;
    read_rows<E, T>(tokens<const E>(p.k, b, h), keys, p.key_dim, T(1), w.k);
    read_rows<E, T>(tokens<const E>(p.v, b, h), keys, p.value_dim, T(1), w.v);
    for (int tile = 0; tile < w.tiling.count; ++tile) backward_tile<E, T>(p, w, b, h, tile);
    if (p.grad_k) write_rows<E, T>(tokens<E>(p.grad_k, b, h), w.grad_k, w.k_pitch, keys, p.key_dim, T(1));
    if (p.grad_v) write_rows<E, T>(tokens<E>(p.grad_v, b, h), w.grad_v, w.v_pitch, keys, p.value_dim, T(1));
  }
}

int64_t items(const Params& p) {
  return p.batch * p.heads;
}
size_t scratch(const Params& p) {
  return p.dtype == DType::f64 ? BackwardScratch<double>(p, Scratch(nullptr)).size
                               : BackwardScratch<float>(p, Scratch(nullptr)).size;
}
void run(const Params& p, int64_t begin, int64_t end, void* memory) {
  with_dtype(p.dtype, [&](auto element) { backward_range<decltype(element)>(p, begin, end, memory); });
}

}  // namespace

extern const CpuKernel kBackward;
const CpuKernel kBackward = {items, scratch, run};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::attention_with_size
