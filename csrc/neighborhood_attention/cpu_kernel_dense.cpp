// Neighborhood attention where each group of the dilation is one neighborhood: dense attention of at most 64
// tokens, on one core, one instruction set. The floor is that of cpu_kernel.cpp.
#include "cpu_kernel.h"
#include "groups_cpu.h"
#include "vitkernels/tile_attention_cpu.h"

namespace vitkernels::neighborhood_attention {
namespace VITKERNELS_ISA {
namespace {

// A group's tokens in one line, row by row, as [token][channel].
template <class T>
struct Line {
  int tokens, columns, channels;
  ptrdiff_t width;
  T* data;

  Line(const Params& p, int channels, Scratch& scratch)
      : tokens(p.kernel_h * p.kernel_w),
        columns(p.kernel_w),
        channels(channels),
        width(round_up_lanes<T>(channels)),
        data(scratch.take<T>(tokens * width)) {}

  // In place where the group lies as a line already.
  template <class E>
  Matrix<const T> read(const Group& g, const View& view, T factor) const {
    if constexpr (kSame<E, T>) {
      if (factor == 1 && g.step_y * view.stride[1] == columns * g.stride(view))
        return {g.token<const T>(view, 0, 0), g.stride(view), view.stride[4]};
    }
    for (int y = 0; y < tokens / columns; ++y)
      pack(data + y * columns * width, static_cast<int>(width), g.token<const E>(view, y, 0), g.stride(view),
           view.stride[4], columns, channels, factor);
    return {data, width, 1};
  }
  // From here to the tensor, times factors[channel].
  template <class E>
  void write(const Group& g, const View& view, const T* factors) const {
    for (int y = 0; y < tokens / columns; ++y)
      unpack(g.token<E>(view, y, 0), g.stride(view), view.stride[4], data + y * columns * width,
             static_cast<int>(width), columns, channels, factors);
  }
};

// The bias of one head for all pairs, [row token][lane token], rows being keys or queries.
template <class T>
void expand_bias(const Params& p, const T* bias, bool rows_are_queries, T* to, int width) {
  const int tokens = p.kernel_h * p.kernel_w, columns = 2 * p.kernel_w - 1;
  const int centre = (p.kernel_h - 1) * columns + p.kernel_w - 1, sign = rows_are_queries ? 1 : -1;
  for (int row = 0; row < tokens; ++row, to += width)
    for (int y = 0, lane = 0; y < p.kernel_h; ++y)
      for (int x = 0; x < p.kernel_w; ++x, ++lane)
        to[lane] = bias[centre + sign * ((y - row / p.kernel_w) * columns + x - row % p.kernel_w)];
}

// ---- forward

template <class T>
struct ForwardScratch {
  Tiling<T> tiling;
  Line<T> query, key, value;
  T *q, *bias, *expanded, *s, *out, *inverse, *lse, *row, *ones;
  size_t size;

  ForwardScratch(const Params& p, Scratch scratch)
      : tiling(p.kernel_h * p.kernel_w),
        query(p, p.head_dim, scratch),
        key(p, p.head_dim, scratch),
        value(p, p.value_dim, scratch) {
    const size_t n = tiling.tokens, width = tiling.width;
    q = scratch.take<T>(p.head_dim * width);
    bias = scratch.take<T>(p.rpb ? p.entries() : 0);
    expanded = scratch.take<T>(p.rpb ? n * width : 0);
    s = scratch.take<T>(n * width);
    out = scratch.take<T>(p.value_dim * width);
    inverse = scratch.take<T>(width);
    lse = scratch.take<T>(width);
    row = scratch.take<T>(round_up_lanes<T>(tiling.tokens));
    ones = scratch.take<T>(value.width);
    size = scratch.used;
  }
};

template <class E>
void forward_range(const Params& p, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  const ForwardScratch<T> w(p, Scratch(memory));
  const int n = w.tiling.tokens, width = w.tiling.width;
  const int64_t groups = group_count(p);
  for (int i = 0; i < w.value.width; ++i) w.ones[i] = 1;
  for (size_t i = 0, size = p.rpb ? static_cast<size_t>(n) * width : 0; i < size; ++i) w.expanded[i] = 0;
  int bias_head = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int head = static_cast<int>(item / groups);
    const Group g(p, item % groups, head);
    if (p.rpb && head != bias_head) {
      read_bias(p, bias_head = head, w.bias);
      expand_bias(p, w.bias, false, w.expanded, width);
    }
    const Matrix<const T> q = w.query.template read<E>(g, p.q, T(1));
    pack(w.q, width, q.data, q.channel, q.token, p.head_dim, n, static_cast<T>(p.scale));
    const Matrix<const T> k = w.key.template read<E>(g, p.k, T(1)),
                          v = w.value.template read<E>(g, p.v, T(1));
    // Channels are dense here, never tokens, so no odd token is computed on its own.
    const ForwardTile<T> task{
        n,   width, 0,         p.head_dim, p.value_dim, w.q, p.rpb ? w.expanded : nullptr,
        w.s, w.out, w.inverse, w.lse,      w.row};
    task.run(k, v);
    unpack(w.value.data, 1, w.value.width, w.out, width, p.value_dim, n, w.inverse);
    w.value.template write<E>(g, p.out, w.ones);
    if (!p.lse) continue;
    for (int i = 0; i < n; ++i) *g.token<T>(p.lse, i / p.kernel_w, i % p.kernel_w) = w.lse[i];
  }
}

// ---- backward

template <class T>
struct BackwardScratch {
  Tiling<T> tiling;
  Line<T> query, key, value, grad_out;
  int channel_width;  // of k_channels and grad_q, which have channels in the lanes
  T *k, *v, *k_channels, *lse, *delta, *bias, *expanded, *grad_bias, *p, *dl, *grad_q, *grad_k, *grad_v;
  T *ones, *scales;  // factors of unpack
  size_t size;

  BackwardScratch(const Params& params, Scratch scratch)
      : tiling(params.kernel_h * params.kernel_w),
        query(params, params.head_dim, scratch),
        key(params, params.head_dim, scratch),
        value(params, params.value_dim, scratch),
        grad_out(params, params.value_dim, scratch) {
    const size_t n = tiling.tokens, d = params.head_dim, dv = params.value_dim, width = tiling.width;
    channel_width = round_up_lanes<T>(params.head_dim);
    const size_t widest = imax(imax(channel_width, static_cast<int>(value.width)), tiling.width);
    k = scratch.take<T>(d * width);
    v = scratch.take<T>(dv * width);
    k_channels = scratch.take<T>(n * channel_width);
    lse = scratch.take<T>(n);
    delta = scratch.take<T>(n);
    bias = scratch.take<T>(params.rpb ? params.entries() : 0);
    expanded = scratch.take<T>(params.rpb ? n * width : 0);
    grad_bias = scratch.take<T>(params.grad_rpb ? n * width : 0);
    p = scratch.take<T>(n * width);
    dl = scratch.take<T>(n * width);
    grad_q = scratch.take<T>(n * channel_width);
    grad_k = scratch.take<T>(d * width);
    grad_v = scratch.take<T>(dv * width);
    ones = scratch.take<T>(widest);
    scales = scratch.take<T>(widest);
    size = scratch.used;
  }
  static int imax(int a, int b) { return a > b ? a : b; }
};

template <class E, class T>
void backward_group(const Params& p, const Group& g, const BackwardScratch<T>& w) {
  const int n = w.tiling.tokens, d = p.head_dim, dv = p.value_dim, width = w.tiling.width;
  const Matrix<const T> q = w.query.template read<E>(g, p.q, static_cast<T>(p.scale));
  const Matrix<const T> k = w.key.template read<E>(g, p.k, T(1));
  Matrix<const T> grad_out = {};
  for (int i = 0; i < n; ++i) {
    w.lse[i] = *g.token<const T>(p.lse, i / p.kernel_w, i % p.kernel_w);
    w.delta[i] = p.grad_lse ? -*g.token<const T>(p.grad_lse, i / p.kernel_w, i % p.kernel_w) : T(0);
  }
  pack(w.k, width, k.data, k.channel, k.token, d, n, T(1));
  if (p.grad_q) pack(w.k_channels, w.channel_width, k.data, k.token, k.channel, n, d, T(1));
  if (p.grad_out) {
    const Matrix<const T> v = w.value.template read<E>(g, p.v, T(1));
    pack(w.v, width, v.data, v.channel, v.token, dv, n, T(1));
    grad_out = w.grad_out.template read<E>(g, p.grad_out, T(1));
  }
  const BackwardTile<T> task{n,      width,   n,
                             0,      d,       p.grad_out ? dv : 0,
                             w.k,    w.v,     p.rpb ? w.expanded : nullptr,
                             w.lse,  w.delta, true,
                             w.p,    w.dl,    nullptr,
                             nullptr};
  task.run(q, grad_out);

  if (p.grad_v) {
    task.sum_queries(grad_out, dv, w.p, nullptr, w.grad_v);
    unpack(w.value.data, 1, w.value.width, w.grad_v, width, dv, n, w.ones);
    w.value.template write<E>(g, p.grad_v, w.ones);
  }
  if (p.grad_k) {
    task.sum_queries(q, d, w.dl, nullptr, w.grad_k);
    unpack(w.key.data, 1, w.key.width, w.grad_k, width, d, n, w.ones);
    w.key.template write<E>(g, p.grad_k, w.ones);
  }
  if (p.grad_q) {
    multiply<T>(w.channel_width / kLanes<T>, {n, n, w.dl, width, 1, w.k_channels, w.channel_width, nullptr, 0,
                                              w.query.data, w.channel_width});
    w.query.template write<E>(g, p.grad_q, w.scales);
  }
  for (int i = 0; p.grad_rpb && i < n * width; i += kLanes<T>)
    store(w.grad_bias + i, load(w.grad_bias + i) + load(w.dl + i));
}

// to[entry] = sum of the pairs, [query][key], that share the entry.
template <class T>
void collect_bias(const Params& p, const T* pairs, int width, T* to) {
  const int tokens = p.kernel_h * p.kernel_w, columns = 2 * p.kernel_w - 1;
  for (int i = 0; i < p.entries(); ++i) to[i] = 0;
  for (int query = 0; query < tokens; ++query)
    for (int key = 0; key < tokens; ++key)
      to[(key / p.kernel_w - query / p.kernel_w + p.kernel_h - 1) * columns + key % p.kernel_w -
         query % p.kernel_w + p.kernel_w - 1] += pairs[static_cast<ptrdiff_t>(query) * width + key];
}

template <class E>
void backward_range(const Params& p, int64_t begin, int64_t end, void* memory, void* partials) {
  using T = Compute<E>;
  const BackwardScratch<T> w(p, Scratch(memory));
  const int n = w.tiling.tokens, width = w.tiling.width;
  const int64_t chunk = chunk_groups(p), chunks = chunk_count(p), groups = group_count(p);
  for (int i = 0; i < w.channel_width || i < w.value.width || i < width; ++i) {
    w.ones[i] = 1;
    w.scales[i] = static_cast<T>(p.scale);
  }
  for (int i = 0; p.rpb && i < n * width; ++i) w.expanded[i] = 0;
  int bias_head = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int head = static_cast<int>(item / chunks);
    const int64_t c = item % chunks, last = (c + 1) * chunk < groups ? (c + 1) * chunk : groups;
    if (p.rpb && head != bias_head) {
      read_bias(p, bias_head = head, w.bias);
      expand_bias(p, w.bias, true, w.expanded, width);
    }
    for (int i = 0; p.grad_rpb && i < n * width; ++i) w.grad_bias[i] = 0;
    for (int64_t i = c * chunk; i < last; ++i) backward_group<E, T>(p, Group(p, i, head), w);
    if (p.grad_rpb)
      collect_bias(p, w.grad_bias, width, static_cast<T*>(partials) + (c * p.heads + head) * p.entries());
  }
}

// ---- by dtype

int64_t forward_items(const Params& p) {
  return group_count(p) * p.heads;
}
size_t forward_scratch(const Params& p) {
  return p.dtype == DType::f64 ? ForwardScratch<double>(p, Scratch(nullptr)).size
                               : ForwardScratch<float>(p, Scratch(nullptr)).size;
}
void forward(const Params& p, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto element) { forward_range<decltype(element)>(p, begin, end, scratch); });
}
size_t backward_scratch(const Params& p) {
  return p.dtype == DType::f64 ? BackwardScratch<double>(p, Scratch(nullptr)).size
                               : BackwardScratch<float>(p, Scratch(nullptr)).size;
}
void backward(const Params& p, int64_t begin, int64_t end, void* scratch, void* partials) {
  with_dtype(p.dtype,
             [&](auto element) { backward_range<decltype(element)>(p, begin, end, scratch, partials); });
}

}  // namespace

extern const CpuKernel kDense;
const CpuKernel kDense = {forward_items,    forward_scratch, forward,  backward_items,
                          backward_scratch, partials_size,   backward, reduce_partials};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::neighborhood_attention
