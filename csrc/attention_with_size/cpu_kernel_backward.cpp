// Proportional attention on one core, one instruction set: backward.
//
// Floor of N queries and M keys: N M (3 d + 2 dv) multiply-adds at two vectors of them a cycle, and N M
// exponentials. An item is a whole head, so that the gradients of keys and values are added up in one place;
// tiles of queries go by and everything of a head stays in cache.
#include "rows_cpu.h"

namespace vitkernels::attention_with_size {
namespace VITKERNELS_ISA {
namespace {

template <class T>
struct BackwardScratch {
  Tiling<T> tiling;
  KeyTiles tiles;
  int k_pitch, v_pitch;
  T *sizes, *k, *v, *grad_k, *grad_v;                          // of all keys
  T *q, *g, *q_rows, *g_rows, *lse, *delta, *grad_q, *p, *ds;  // of a tile of queries
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
    delta = scratch.take<T>(width);
    grad_q = scratch.take<T>(width * k_pitch);
    p = scratch.take<T>(tiles.width * width);
    ds = scratch.take<T>(tiles.width * width);
    size = scratch.used;
  }
};

// p <- P, ds <- dS, from the logits and <g, v>. Where all keys are here, their sums take the rounding of lse
// and of out out of the gradients, and where one key takes all, <g, v> - sum is exactly 0.
template <class T, int V>
void weights(T* p, T* ds, int width, int keys, const T* lse, const T* delta, bool wanted, bool whole) {
  constexpr int L = kLanes<T>;
  Vec<T> lses[V], deltas[V], sum[V], total[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    lses[v] = load(lse + v * L);
    deltas[v] = load(delta + v * L);
    sum[v] = total[v] = Vec<T>{};
  }
  T *pm = p, *dm = ds;
  if (!wanted || !whole) {
    for (int m = 0; m < keys; ++m, pm += width, dm += width)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Vec<T> e = exp_softmax<T>(load(pm + v * L) - lses[v]);
        store(pm + v * L, e);
        if (wanted) store(dm + v * L, e * (load(dm + v * L) - deltas[v]));
      }
    return;
  }
  for (int m = 0; m < keys; ++m, pm += width, dm += width)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Vec<T> e = exp_softmax<T>(load(pm + v * L) - lses[v]);
      store(pm + v * L, e);
      sum[v] += e * load(dm + v * L);
      total[v] += e;
    }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    // A lane without a query has no weights.
    total[v] = T(1) / (total[v] == T(0) ? broadcast(T(1)) : total[v]);
    sum[v] *= total[v];
  }
  pm = p;
  dm = ds;
  for (int m = 0; m < keys; ++m, pm += width, dm += width)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Vec<T> e = load(pm + v * L) * total[v];
      store(pm + v * L, e);
      store(dm + v * L, e * (load(dm + v * L) - sum[v] - deltas[v]));
    }
}

// lse and delta of a tile of queries; where all keys are in one tile, delta is - grad_lse alone.
template <class E, class T>
void read_numbers(const Params& p, const BackwardScratch<T>& w, int64_t b, int64_t h, int start,
                  int queries) {
  constexpr int L = kLanes<T>;
  const Matrix<const T> lse = tokens<const T>(p.lse, b, h, start);
  const Matrix<const T> grad_lse = tokens<const T>(p.grad_lse, b, h, p.grad_lse ? start : 0);
  const Matrix<const E> out = tokens<const E>(p.out, b, h, start);
  const int dv = p.value_dim, whole = dv / L * L;
  for (int i = 0; i < queries; ++i) {
    w.lse[i] = lse.data[i * lse.token];
    T delta = p.grad_lse ? -grad_lse.data[i * grad_lse.token] : T(0);
    if (p.grad_out && w.tiles.count > 1) {
      const E* o = out.data + i * out.token;
      const T* g = w.g_rows + static_cast<ptrdiff_t>(i) * w.v_pitch;
      Vec<T> sum = {};
      for (int c = 0; c < whole; c += L) sum += load(o + c) * load(g + c);
      if (whole < dv) sum += load_first(o + whole, dv - whole) * load(g + whole);
      delta += across<T>(sum);
    }
    w.delta[i] = delta;
  }
  for (int i = queries; i % L; ++i) {  // a lane without a query has weights of 0
    w.lse[i] = static_cast<T>(__builtin_inff());
    w.delta[i] = 0;
  }
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
  read_numbers<E, T>(p, w, b, h, start, queries);

  for (int part = 0; part < w.tiles.count; ++part) {
    const int key = w.tiles.start(part), count = w.tiles.size(part);
    const ptrdiff_t k_at = static_cast<ptrdiff_t>(key) * w.k_pitch,
                    v_at = static_cast<ptrdiff_t>(key) * w.v_pitch;
    multiply<T>(vecs,
                {count, d, w.k + k_at, w.k_pitch, 1, w.q, width, nullptr, 0, w.p, width, w.sizes + key});
    if (wanted) multiply<T>(vecs, {count, dv, w.v + v_at, w.v_pitch, 1, w.g, width, nullptr, 0, w.ds, width});
    const bool whole = w.tiles.count == 1;
    int v = 0;
    for (; v + 2 <= vecs; v += 2)
      weights<T, 2>(w.p + v * L, w.ds + v * L, width, count, w.lse + v * L, w.delta + v * L, wanted, whole);
    if (v < vecs)
      weights<T, 1>(w.p + v * L, w.ds + v * L, width, count, w.lse + v * L, w.delta + v * L, wanted, whole);
    if (p.grad_v) {
      T* to = w.grad_v + v_at;
      multiply<T>(w.v_pitch / L, {count, dv ? queries : 0, w.p, width, 1, w.g_rows, w.v_pitch,
                                  tile ? to : nullptr, w.v_pitch, to, w.v_pitch});
    }
    if (p.grad_k) {
      T* to = w.grad_k + k_at;
      multiply<T>(w.k_pitch / L, {count, queries, w.ds, width, 1, w.q_rows, w.k_pitch, tile ? to : nullptr,
                                  w.k_pitch, to, w.k_pitch});
    }
    if (p.grad_q)
      multiply<T>(w.k_pitch / L, {queries, count, w.ds, 1, width, w.k + k_at, w.k_pitch,
                                  part ? w.grad_q : nullptr, w.k_pitch, w.grad_q, w.k_pitch});
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
  switch (p.dtype) {
    case DType::f64:
      return backward_range<double>(p, begin, end, memory);
    case DType::f32:
      return backward_range<float>(p, begin, end, memory);
    case DType::f16:
      return backward_range<f16>(p, begin, end, memory);
    case DType::bf16:
      return backward_range<bf16>(p, begin, end, memory);
  }
}

}  // namespace

extern const CpuKernel kBackward;
const CpuKernel kBackward = {items, scratch, run};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::attention_with_size
