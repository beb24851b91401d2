// Window attention on one core, one instruction set.
//
// Floor of a window of N tokens: forward 2 N^2 (d + dv) FLOPs and N^2 exponentials, backward
// 2 N^2 (3 d + 2 dv) FLOPs and N^2 exponentials, at 2 FMAs a cycle. Each tensor crosses memory once.
#include "cpu_kernel.h"

#include "vitkernels/tile_attention_cpu.h"
#include "vitkernels/window_bias_cpu.h"

namespace vitkernels::window_attention {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

namespace {

// Beyond this many logits a head's bias is expanded tile by tile instead of once.
constexpr int64_t kCachedLogits = 1 << 16;
constexpr int64_t kMaxChunks = 64;

int64_t chunk_windows(const Params& p) {
  // A chunk ends with the collection of its bias gradient, at the price of a fraction of a window.
  const int64_t sixteenth = (p.batch + 15) / 16, least = (p.batch + kMaxChunks - 1) / kMaxChunks;
  const int64_t chunk = sixteenth < 2 ? 2 : sixteenth > 8 ? 8 : sixteenth;
  return chunk < least ? least : chunk;
}
int64_t chunk_count(const Params& p) {
  return (p.batch + chunk_windows(p) - 1) / chunk_windows(p);
}

bool converted(const Params& p) {
  return p.dtype == DType::f16 || p.dtype == DType::bf16;
}

template <class E>
Matrix<E> matrix(const View& view, int64_t batch, int64_t head) {
  return {static_cast<E*>(view.data) + batch * view.stride[0] + head * view.stride[1], view.stride[2],
          view.stride[3]};
}

template <class T>
WindowBias<T> make_bias(const Params& p, bool rows_are_queries, Scratch& scratch) {
  return {p.window_h, p.window_w, p.signed_bias, rows_are_queries, scratch};
}

// ---- forward

template <class T>
struct ForwardScratch {
  Tiling<T> tiling;
  WindowBias<T> table;
  T *q, *k, *v, *bias, *s, *out, *inverse, *lse, *row;
  size_t size;

  ForwardScratch(const Params& p, Scratch scratch)
      : tiling(p.tokens()), table(make_bias<T>(p, false, scratch)) {
    const size_t n = p.tokens(), width = tiling.width;
    q = scratch.take<T>(p.head_dim * width);
    k = scratch.take<T>(converted(p) ? copy_size<T>(n, p.head_dim) : 0);
    v = scratch.take<T>(converted(p) ? copy_size<T>(n, p.value_dim) : 0);
    bias = scratch.take<T>(n * width + kLanes<T>);
    s = scratch.take<T>(n * width);
    out = scratch.take<T>(p.value_dim * width);
    inverse = scratch.take<T>(width);
    lse = scratch.take<T>(width);
    row = scratch.take<T>(round_up_lanes<T>(n));
    size = scratch.used;
  }
};

template <class E>
void forward_range(const Params& p, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  ForwardScratch<T> w(p, Scratch(memory));
  const Tiling<T>& tiling = w.tiling;
  const int n = p.tokens();
  const T scale = static_cast<T>(p.scale);
  int64_t bias_head = -1, bias_tile = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item % p.batch, h = item / p.batch / tiling.count;
    const int tile = static_cast<int>(item / p.batch % tiling.count);
    const int start = tiling.start(tile), lanes = tiling.lanes(tile);
    if (p.bias_table && (h != bias_head || tile != bias_tile)) {
      if (h != bias_head) w.table.read(p.bias_dtype, p.bias_table, h);
      w.table.expand(w.bias, n, start, lanes, tiling.width);
      bias_head = h;
      bias_tile = tile;
    }
    const Matrix<const E> q = matrix<const E>(p.q, b, h);
    pack(w.q, tiling.width, q.data + start * q.token, q.channel, q.token, p.head_dim, lanes, scale);

    const Matrix<const T> k = readable<E, T>(matrix<const E>(p.k, b, h), n, p.head_dim, w.k);
    const Matrix<const T> v = readable<E, T>(matrix<const E>(p.v, b, h), n, p.value_dim, w.v);
    const int odd = odd_tokens(tiling, k.token == 1 && v.token == 1);
    ForwardTile<T> task{
        n,   tiling.width, odd,       p.head_dim, p.value_dim, w.q, p.bias_table ? w.bias : nullptr,
        w.s, w.out,        w.inverse, w.lse,      w.row};
    const Matrix<E> out = matrix<E>(p.out, b, h);
    E* first = out.data + start * out.token;
    bool in_place = false;
    if constexpr (kSame<E, T>) {
      in_place = lanes_in_place<E, T>(out, lanes, tiling.width, odd);
      if (in_place) {
        task.out = first;
        task.out_row = out.channel;
      }
    }
    task.run(k, v);
    if (!in_place) unpack(first, out.channel, out.token, w.out, tiling.width, p.value_dim, lanes, w.inverse);
    if (!p.lse) continue;
    T* lse =
        static_cast<T*>(p.lse.data) + b * p.lse.stride[0] + h * p.lse.stride[1] + start * p.lse.stride[2];
    for (int i = 0; i < lanes; ++i) lse[i * p.lse.stride[2]] = w.lse[i];
  }
}

// ---- backward

template <class T>
struct BackwardScratch {
  Tiling<T> tiling;
  WindowBias<T> table, grad_table;
  bool cached;        // a head's whole bias, and a chunk's whole bias gradient, are kept
  int channel_width;  // of k_channels and grad_q, which have channels in the lanes
  T *k, *v, *k_channels, *q, *grad_out, *lse, *delta, *bias, *grad_bias, *p, *dl, *odd_p, *odd_dl, *grad_q,
      *grad_k, *grad_v;
  T *ones, *scales;  // factors of unpack
  size_t size;

  BackwardScratch(const Params& params, Scratch scratch)
      : tiling(params.tokens()),
        table(make_bias<T>(params, true, scratch)),
        grad_table(make_bias<T>(params, true, scratch)) {
    const size_t n = params.tokens(), d = params.head_dim, dv = params.value_dim, width = tiling.width;
    cached = static_cast<int64_t>(n * width * tiling.count) <= kCachedLogits;
    channel_width = round_up_lanes<T>(params.head_dim);
    const size_t widest = channel_width > tiling.width ? channel_width : width;
    const size_t logits = n * width * (cached ? tiling.count : 1);
    k = scratch.take<T>(d * width);
    v = scratch.take<T>(dv * width);
    k_channels = scratch.take<T>(n * channel_width);
    q = scratch.take<T>(copy_size<T>(n, d));
    grad_out = scratch.take<T>(converted(params) ? copy_size<T>(n, dv) : 0);
    lse = scratch.take<T>(round_up_lanes<T>(n));
    delta = scratch.take<T>(round_up_lanes<T>(n));
    bias = scratch.take<T>(logits + kLanes<T>);
    grad_bias = scratch.take<T>(cached ? logits : 0);
    p = scratch.take<T>(n * width);
    dl = scratch.take<T>(n * width);
    odd_p = scratch.take<T>(kLanes<T> / 8 * round_up_lanes<T>(n));
    odd_dl = scratch.take<T>(kLanes<T> / 8 * round_up_lanes<T>(n));
    grad_q = scratch.take<T>(n * channel_width);
    grad_k = scratch.take<T>(d * width);
    grad_v = scratch.take<T>(dv * width);
    ones = scratch.take<T>(widest);
    scales = scratch.take<T>(widest);
    size = scratch.used;
  }

  T* tile_of(T* array, int tile, int n) const {
    return array + (cached ? static_cast<size_t>(tile) * n * tiling.width : 0);
  }
};

// delta[token] = sum over channels of a * b.
template <class E, class T>
void row_dots(T* delta, Matrix<const E> a, Matrix<const E> b, int tokens, int channels) {
  constexpr int L = kLanes<T>;
  if (a.token == 1 && b.token == 1) {
    for (int i = 0; i < tokens; i += L) {
      const int count = imin(L, tokens - i);
      Vec<T> sum[2] = {};
      for (int c = 0; c < channels; ++c) {
        const E *pa = a.data + c * a.channel + i, *pb = b.data + c * b.channel + i;
        sum[c & 1] += count == L ? load(pa) * load(pb) : load_first(pa, count) * load_first(pb, count);
      }
      store(delta + i, sum[0] + sum[1]);
    }
  } else if (a.channel == 1 && b.channel == 1) {
    const int whole = channels / L * L;
    for (int i = 0; i < tokens; ++i) {
      const E *pa = a.data + i * a.token, *pb = b.data + i * b.token;
      Vec<T> sum = {};
      for (int c = 0; c < whole; c += L) sum += load(pa + c) * load(pb + c);
      if (whole < channels)
        sum += load_first(pa + whole, channels - whole) * load_first(pb + whole, channels - whole);
      T total = 0;
      for (int l = 0; l < L; ++l) total += sum[l];
      delta[i] = total;
    }
  } else {
    for (int i = 0; i < tokens; ++i) {
      T total = 0;
      for (int c = 0; c < channels; ++c)
        total +=
            load_one(a.data + i * a.token + c * a.channel) * load_one(b.data + i * b.token + c * b.channel);
      delta[i] = total;
    }
  }
}

// The first lanes of a tile, [channel][lane]: as they lie where that can be, else packed.
template <class T>
struct Lanes {
  const T* data;
  ptrdiff_t row;
};
template <class E, class T>
Lanes<T> lanes_of(Matrix<const E> m, const Tiling<T>& tiling, int tile, int odd, int channels, T* scratch) {
  const int lanes = tiling.lanes(tile);
  const E* first = m.data + tiling.start(tile) * m.token;
  if constexpr (kSame<E, T>)
    if (lanes_in_place<const E, T>(m, lanes, tiling.width, odd)) return {first, m.channel};
  pack(scratch, tiling.width, first, m.channel, m.token, channels, lanes, T(1));
  return {scratch, tiling.width};
}

// The gradient of the tile's keys or values: the sum over queries of m * weights.
template <class E, class T>
void store_sums(const BackwardTile<T>& task, Matrix<const T> m, int channels, const T* weights,
                const T* odd_weights, Matrix<E> to, int start, T* scratch, const T* ones) {
  E* first = to.data + start * to.token;
  if constexpr (kSame<E, T>)
    if (lanes_in_place<E, T>(to, task.lanes, task.width, task.odd))
      return task.sum_queries(m, channels, weights, odd_weights, first, to.channel);
  task.sum_queries(m, channels, weights, odd_weights, scratch, task.width);
  unpack(first, to.channel, to.token, scratch, task.width, channels, task.lanes, ones);
}

template <class E, class T>
void backward_window(const Params& p, const BackwardScratch<T>& w, WindowBias<T>& grad_table, int64_t b,
                     int64_t h) {
  const Tiling<T>& tiling = w.tiling;
  const int n = p.tokens(), d = p.head_dim, dv = p.value_dim, width = tiling.width;
  const Matrix<const E> k = matrix<const E>(p.k, b, h), v = matrix<const E>(p.v, b, h);
  const T scale = static_cast<T>(p.scale);
  const Matrix<const T> q = copy<E, T>(matrix<const E>(p.q, b, h), n, d, scale, w.q);
  const bool whole = tiling.count == 1;
  for (int i = 0; i < n; ++i) w.delta[i] = 0;
  Matrix<const T> grad_out = {};
  if (p.grad_out) {
    const Matrix<const E> g = matrix<const E>(p.grad_out, b, h);
    if (!whole) row_dots<E, T>(w.delta, g, matrix<const E>(p.out, b, h), n, dv);
    grad_out = readable<E, T>(g, n, dv, w.grad_out);
  }
  const Matrix<const T> lse = matrix<const T>(p.lse, b, h);
  for (int i = 0; i < n; ++i) w.lse[i] = lse.data[i * lse.token];
  if (p.grad_lse) {
    const Matrix<const T> grad_lse = matrix<const T>(p.grad_lse, b, h);
    for (int i = 0; i < n; ++i) w.delta[i] -= grad_lse.data[i * grad_lse.token];
  }
  if (p.grad_q) pack(w.k_channels, w.channel_width, k.data, k.token, k.channel, n, d, T(1));

  for (int tile = 0; tile < tiling.count; ++tile) {
    const int start = tiling.start(tile), lanes = tiling.lanes(tile);
    T* bias = p.bias_table ? w.tile_of(w.bias, tile, n) : nullptr;
    if (bias && !w.cached) w.table.expand(bias, n, start, lanes, width);
    const int odd = odd_tokens(tiling, q.token == 1 && (!p.grad_out || grad_out.token == 1));
    const Lanes<T> keys = lanes_of<E, T>(k, tiling, tile, odd, d, w.k);
    const Lanes<T> values = p.grad_out ? lanes_of<E, T>(v, tiling, tile, odd, dv, w.v) : Lanes<T>{};
    T* const bias_sum = p.grad_bias_table && w.cached ? w.tile_of(w.grad_bias, tile, n) : nullptr;
    const BackwardTile<T> task{n,         width,       lanes,   odd,      d,        p.grad_out ? dv : 0,
                               keys.data, values.data, bias,    w.lse,    w.delta,  whole,
                               w.p,       w.dl,        w.odd_p, w.odd_dl, keys.row, values.row,
                               bias_sum};
    task.run(q, grad_out);

    if (p.grad_v)
      store_sums<E, T>(task, grad_out, dv, w.p, w.odd_p, matrix<E>(p.grad_v, b, h), start, w.grad_v, w.ones);
    if (p.grad_k)
      store_sums<E, T>(task, q, d, w.dl, w.odd_dl, matrix<E>(p.grad_k, b, h), start, w.grad_k, w.ones);
    if (p.grad_q)
      multiply<T>(w.channel_width / kLanes<T>,
                  {n, lanes, w.dl, width, 1, w.k_channels + static_cast<ptrdiff_t>(start) * w.channel_width,
                   w.channel_width, tile ? w.grad_q : nullptr, w.channel_width, w.grad_q, w.channel_width});
    if (p.grad_bias_table && !w.cached) grad_table.collect(w.dl, n, start, lanes, width);
  }
  if (p.grad_q) {
    const Matrix<E> to = matrix<E>(p.grad_q, b, h);
    unpack(to.data, to.token, to.channel, w.grad_q, w.channel_width, n, d, w.scales);
  }
}

template <class E>
void backward_range(const Params& p, int64_t begin, int64_t end, void* memory, void* partials) {
  using T = Compute<E>;
  const BackwardScratch<T> w(p, Scratch(memory));
  WindowBias<T> table = w.table, grad_table = w.grad_table;
  const Tiling<T>& tiling = w.tiling;
  const int n = p.tokens();
  const int64_t chunk = chunk_windows(p), chunks = chunk_count(p);
  for (int i = 0; i < w.channel_width || i < tiling.width; ++i) {
    w.ones[i] = 1;
    w.scales[i] = static_cast<T>(p.scale);
  }
  int64_t bias_head = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = item / chunks, c = item % chunks;
    if (p.bias_table && h != bias_head) {
      table.read(p.bias_dtype, p.bias_table, h);
      for (int tile = 0; w.cached && tile < tiling.count; ++tile)
        table.expand(w.tile_of(w.bias, tile, n), n, tiling.start(tile), tiling.lanes(tile), tiling.width);
      bias_head = h;
    }
    if (p.grad_bias_table) {
      grad_table.clear();
      const size_t logits = w.cached ? static_cast<size_t>(n) * tiling.width * tiling.count : 0;
      for (size_t i = 0; i < logits; ++i) w.grad_bias[i] = 0;
    }
    const int64_t last = (c + 1) * chunk < p.batch ? (c + 1) * chunk : p.batch;
    for (int64_t b = c * chunk; b < last; ++b) backward_window<E, T>(p, w, grad_table, b, h);
    if (p.grad_bias_table) {
      for (int tile = 0; w.cached && tile < tiling.count; ++tile)
        grad_table.collect(w.tile_of(w.grad_bias, tile, n), n, tiling.start(tile), tiling.lanes(tile),
                           tiling.width);
      grad_table.fold(static_cast<T*>(partials) + (c * p.heads + h) * p.entries(), p.entries());
    }
  }
}

template <class T, class B>
void reduce_as(const Params& p, const T* partials) {
  const int64_t chunks = chunk_count(p), entries = p.entries();
  for (int64_t h = 0; h < p.heads; ++h) {
    B* to = static_cast<B*>(p.grad_bias_table.data) + h * p.grad_bias_table.stride[0];
    for (int64_t t = 0; t < entries; ++t) {
      T sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partials[(c * p.heads + h) * entries + t];
      store_one(to + t * p.grad_bias_table.stride[1], static_cast<Compute<B>>(sum));
    }
  }
}

// ---- by dtype

int64_t forward_items(const Params& p) {
  const int tiles =
      p.dtype == DType::f64 ? Tiling<double>(p.tokens()).count : Tiling<float>(p.tokens()).count;
  return p.heads * tiles * p.batch;
}
size_t forward_scratch(const Params& p) {
  return p.dtype == DType::f64 ? ForwardScratch<double>(p, Scratch(nullptr)).size
                               : ForwardScratch<float>(p, Scratch(nullptr)).size;
}
void forward(const Params& p, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto element) { forward_range<decltype(element)>(p, begin, end, scratch); });
}

int64_t backward_items(const Params& p) {
  return p.heads * chunk_count(p);
}
size_t backward_scratch(const Params& p) {
  return p.dtype == DType::f64 ? BackwardScratch<double>(p, Scratch(nullptr)).size
                               : BackwardScratch<float>(p, Scratch(nullptr)).size;
}
size_t partials_size(const Params& p) {
  return static_cast<size_t>(backward_items(p)) * p.entries() *
         (p.dtype == DType::f64 ? sizeof(double) : sizeof(float));
}
void backward(const Params& p, int64_t begin, int64_t end, void* scratch, void* partials) {
  with_dtype(p.dtype,
             [&](auto element) { backward_range<decltype(element)>(p, begin, end, scratch, partials); });
}
template <class T>
void reduce(const Params& p, const void* partials) {
  const T* from = static_cast<const T*>(partials);
  with_dtype(p.bias_dtype, [&](auto element) { reduce_as<T, decltype(element)>(p, from); });
}
void reduce_partials(const Params& p, const void* partials) {
  p.dtype == DType::f64 ? reduce<double>(p, partials) : reduce<float>(p, partials);
}

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel = {forward_items,    forward_scratch, forward,  backward_items,
                           backward_scratch, partials_size,   backward, reduce_partials};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::window_attention
