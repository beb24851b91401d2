// Proportional attention on one core, one instruction set: forward.
//
// Floor of N queries and M keys: N M (d + dv) multiply-adds at two vectors of them a cycle, and N M
// exponentials of about twelve such instructions each. q, k, v and out cross memory once.
#include "rows_cpu.h"

namespace vitkernels::attention_with_size {
namespace VITKERNELS_ISA {
namespace {

template <class T>
struct ForwardScratch {
  Tiling<T> tiling;
  KeyTiles tiles;
  int k_pitch, v_pitch;
  T *sizes, *q, *k, *v, *p, *out, *top, *sum, *rescale;
  size_t size;

  ForwardScratch(const Params& params, Scratch scratch)
      : tiling(static_cast<int>(params.queries)),
        tiles(params.keys),
        k_pitch(round_up_lanes<T>(params.key_dim)),
        v_pitch(round_up_lanes<T>(params.value_dim)) {
    const size_t width = tiling.width, keys = tiles.keys;
    sizes = scratch.take<T>(round_up_lanes<T>(tiles.keys));
    q = scratch.take<T>(params.key_dim * width);
    k = scratch.take<T>(keys * k_pitch);
    v = scratch.take<T>(keys * v_pitch);
    p = scratch.take<T>(tiles.width * width);
    out = scratch.take<T>(width * v_pitch);
    top = scratch.take<T>(width);
    sum = scratch.take<T>(width);
    rescale = scratch.take<T>(width);
    size = scratch.used;
  }
};

// One step of the online softmax: p <- e^(p + bias - top) with the new top and one bias a key; rescale is
// what belongs to the old one. Sums of products that began with the bias would round as large numbers do.
template <class T, int V>
void online_weights(T* p, int width, int keys, const T* bias, T* top, T* sum, T* rescale) {
  constexpr int L = kLanes<T>;
  const Vec<T> nothing = broadcast(-static_cast<T>(__builtin_inff()));
  Vec<T> tops[V], sums[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) tops[v] = load(top + v * L);
  for (int m = 0; m < keys; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      tops[v] = vmax(load(p + static_cast<ptrdiff_t>(m) * width + v * L) + bias[m], tops[v]);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const Vec<T> old = load(top + v * L);
    store(top + v * L, tops[v]);
    tops[v] = tops[v] == nothing ? Vec<T>{} : tops[v];  // of hidden keys alone: -inf - -inf would be NaN
    const Vec<T> factor = exp_softmax<T>(old - tops[v]);
    store(rescale + v * L, factor);
    sums[v] = load(sum + v * L) * factor;
  }
  for (int m = 0; m < keys;) {
    Vec<T> run[V] = {};
    for (const int end = imin(keys, m + kWeightRun); m < end; ++m, p += width)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<T> e = exp_softmax<T>((load(p + v * L) + bias[m]) - tops[v]);
        store(p + v * L, e);
        run[v] += e;
      }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[v] += run[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(sum + v * L, sums[v]);
}

template <class E>
void forward_range(const Params& p, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  const ForwardScratch<T> w(p, Scratch(memory));
  const int dv = p.value_dim, width = w.tiling.width, keys = w.tiles.keys;
  int64_t current = -1, sized = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / w.tiling.count, b = head / p.heads, h = head % p.heads;
    const int tile = static_cast<int>(item % w.tiling.count), start = w.tiling.start(tile),
              queries = w.tiling.lanes(tile), vecs = ceil_div(queries, L);
    if (b != sized) read_sizes(p.size, b, keys, w.sizes);
    sized = b;
    if (head != current) {
      read_rows<E, T>(tokens<const E>(p.k, b, h), keys, p.key_dim, T(1), w.k);
      read_rows<E, T>(tokens<const E>(p.v, b, h), keys, dv, T(1), w.v);
      current = head;
    }
    const Matrix<const E> q = tokens<const E>(p.q, b, h, start);
    pack(w.q, width, q.data, 1, q.token, p.key_dim, queries, static_cast<T>(p.scale));
    for (int i = 0; i < vecs * L; i += L) {
      store(w.top + i, broadcast(-static_cast<T>(__builtin_inff())));
      store(w.sum + i, Vec<T>{});
    }

    const Matrix<E> to = tokens<E>(p.out, b, h, start);
    for (int part = 0; part < w.tiles.count; ++part) {
      const int key = w.tiles.start(part), count = w.tiles.size(part);
      const T* k = w.k + static_cast<ptrdiff_t>(key) * w.k_pitch;
      multiply<T>(vecs, {count, p.key_dim, k, w.k_pitch, 1, w.q, width, nullptr, 0, w.p, width},
                  logit_run(p.queries));
      int v = 0;
      for (; v + 2 <= vecs; v += 2)
        online_weights<T, 2>(w.p + v * L, width, count, w.sizes + key, w.top + v * L, w.sum + v * L,
                             w.rescale + v * L);
      if (v < vecs)
        online_weights<T, 1>(w.p + v * L, width, count, w.sizes + key, w.top + v * L, w.sum + v * L,
                             w.rescale + v * L);
      for (int i = 0; part && i < queries; ++i) {
        if (w.rescale[i] == T(1)) continue;
        for (int c = 0; c < w.v_pitch; c += L) {
          T* out = w.out + static_cast<ptrdiff_t>(i) * w.v_pitch + c;
          store(out, load(out) * w.rescale[i]);
        }
      }
      Product<T> product{queries,   count,
                         w.p,       1,
                         width,     w.v + static_cast<ptrdiff_t>(key) * w.v_pitch,
                         w.v_pitch, part ? w.out : nullptr,
                         w.v_pitch, w.out,
                         w.v_pitch};
      if (part + 1 == w.tiles.count) {
        for (int i = 0; i < vecs * L; i += L) store(w.rescale + i, T(1) / load(w.sum + i));
        product.row_factor = w.rescale;
        if constexpr (kSame<E, T>)
          if (dv == w.v_pitch) {
            product.c = to.data;
            product.c_row = to.token;
          }
      }
      multiply<T>(w.v_pitch / L, product);
    }
    if (!kSame<E, T> || dv != w.v_pitch) write_rows<E, T>(to, w.out, w.v_pitch, queries, dv, T(1));
    if (!p.lse) continue;
    for (int i = 0; i < vecs * L; i += L) {
      const Vec<T> top = load(w.top + i), sum = load(w.sum + i);
      store(w.sum + i, sum == T(0) ? top : top + log_softmax<T>(sum));  // -inf where every key is hidden
    }
    const Matrix<T> lse = tokens<T>(p.lse, b, h, start);
    for (int i = 0; i < queries; ++i) lse.data[i * lse.token] = w.sum[i];
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

extern const CpuKernel kForward;
const CpuKernel kForward = {items, scratch, run};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::attention_with_size
