// Neighborhood attention on one core, one instruction set.
//
// Floor of a map of T tokens and windows of K keys: forward 2 T K (d + dv) FLOPs and T K exponentials,
// backward 2 T K (3 d + 2 dv) FLOPs and T K exponentials, at 2 FMAs a cycle. Each tensor crosses memory once.
//
// A group of the dilation is walked through by tiles of query rows, keys and values being kept for as many
// rows as a tile sees. In the backward pass one walk computes all gradients: those of keys and values are
// summed in rows that are complete when the last query row that sees them has passed, so that a group has one
// owner and its sums one order.
#include "cpu_kernel.h"

#include "tile_cpu.h"

namespace vitkernels::neighborhood_attention {
namespace VITKERNELS_ISA {
namespace {

int tile_rows(const Params& p) {
  return imin(kRows, longest(p.height, p.dilation_h));
}
int ring_slots(const Params& p) {
  return imin(p.kernel_h + tile_rows(p) - 1, longest(p.height, p.dilation_h));
}
template <class T>
size_t pairs_size(const Params& p) {
  const size_t spread = imin(2 * p.kernel_w - 1, p.kernel_w + kLanes<T> - 1);
  return static_cast<size_t>(tile_rows(p)) * p.kernel_h * spread * kLanes<T>;
}

// ---- forward

// Bands of query rows, for parallelism alone: each reads the rows of keys around it once more.
int bands(const Params& p) {
  const int64_t groups = group_count(p) * p.heads;
  const int rows = longest(p.height, p.dilation_h);
  int count = 1;
  while (groups * count < 16 && rows / (count + 1) >= 2 * kRows) ++count;
  return count;
}

template <class T>
struct ForwardScratch {
  Ring<T> k, v;
  T *q, *s, *out, *inverse, *lse, *mask, *bias;
  size_t size;

  ForwardScratch(const Params& p, Scratch scratch)
      : k(p, ring_slots(p), p.head_dim, scratch), v(p, ring_slots(p), p.value_dim, scratch) {
    const size_t lanes = kLanes<T>, rows = tile_rows(p);
    q = scratch.take<T>(rows * p.head_dim * lanes);
    s = scratch.take<T>(pairs_size<T>(p));
    out = scratch.take<T>(rows * p.value_dim * lanes);
    inverse = scratch.take<T>(rows * lanes);
    lse = scratch.take<T>(rows * lanes);
    mask = scratch.take<T>((2 * p.kernel_w - 1) * lanes);
    bias = scratch.take<T>(p.rpb ? p.entries() : 0);
    size = scratch.used;
  }
};

template <class E, class T>
void forward_tile(const Params& p, const Group& g, const ForwardScratch<T>& w, const T* bias,
                  const Tile<T>& tile) {
  constexpr int L = kLanes<T>;
  const int d = p.head_dim, dv = p.value_dim;
  for (int r = 0; r < tile.rows; ++r) {
    g.prefetch<E>(p.q, tile.y0 + r, tile.x0 + L, L, d);
    pack(w.q + r * d * L, L, g.token<const E>(p.q, tile.y0 + r, tile.x0), p.q.stride[4], g.stride(p.q), d,
         tile.lanes, static_cast<T>(p.scale));
  }
  tile.correlate(w.s, w.q, w.k);
  for (int r = 0; r < tile.rows; ++r) tile.softmax(w.s, r, bias, w.inverse + r * L, w.lse + r * L);
  tile.accumulate(w.out, w.s, w.v);
  for (int r = 0; r < tile.rows; ++r) {
    unpack(g.token<E>(p.out, tile.y0 + r, tile.x0), p.out.stride[4], g.stride(p.out), w.out + r * dv * L, L,
           dv, tile.lanes, w.inverse + r * L);
    if (!p.lse) continue;
    T* lse = g.token<T>(p.lse, tile.y0 + r, tile.x0);
    for (int i = 0; i < tile.lanes; ++i) lse[i * g.stride(p.lse)] = w.lse[r * L + i];
  }
}

template <class E>
void forward_range(const Params& p, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  const ForwardScratch<T> w(p, Scratch(memory));
  w.k.clear();
  w.v.clear();
  const int count = bands(p);
  int bias_head = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int head = static_cast<int>(item % p.heads), band = static_cast<int>(item / p.heads % count);
    const Group g(p, item / p.heads / count, head);
    if (p.rpb && head != bias_head) read_bias(p, bias_head = head, w.bias);
    const int from = g.y.size * band / count, to = g.y.size * (band + 1) / count;
    int y = from, read = g.y.first(from);
    for (int tiles = ceil_div(to - from, kRows); tiles > 0; --tiles) {
      const int rows = ceil_div(to - y, tiles);
      for (; read < g.y.last(y + rows - 1); ++read) {
        w.k.template read<E>(g, p.k, read);
        w.v.template read<E>(g, p.v, read);
      }
      for (int x = 0; x < g.x.size; x += kLanes<T>)
        forward_tile<E, T>(p, g, w, p.rpb ? w.bias : nullptr, Tile<T>(g, y, rows, x, w.mask));
      y += rows;
    }
  }
}

// ---- backward

template <class T>
struct BackwardScratch {
  Ring<T> k, v, grad_k, grad_v;
  T *q, *grad_out, *p, *dl, *grad_q, *mask, *bias, *grad_bias, *ones, *scales;
  size_t size;

  BackwardScratch(const Params& params, Scratch scratch)
      : k(params, ring_slots(params), params.head_dim, scratch),
        v(params, ring_slots(params), params.value_dim, scratch),
        grad_k(params, ring_slots(params), params.head_dim, scratch),
        grad_v(params, ring_slots(params), params.value_dim, scratch) {
    const size_t lanes = kLanes<T>, rows = tile_rows(params), entries = params.entries();
    q = scratch.take<T>(rows * params.head_dim * lanes);
    grad_out = scratch.take<T>(rows * params.value_dim * lanes);
    p = scratch.take<T>(pairs_size<T>(params));
    dl = scratch.take<T>(pairs_size<T>(params));
    grad_q = scratch.take<T>(rows * params.head_dim * lanes);
    mask = scratch.take<T>((2 * params.kernel_w - 1) * lanes);
    bias = scratch.take<T>(params.rpb ? entries : 0);
    grad_bias = scratch.take<T>(params.grad_rpb ? entries * lanes : 0);
    ones = scratch.take<T>(k.columns);
    scales = scratch.take<T>(lanes);
    size = scratch.used;
  }
};

template <class T>
Vec<T> read_lanes(const Group& g, const View& view, const Tile<T>& tile, int r) {
  Vec<T> lanes = {};
  const T* from = g.token<const T>(view, tile.y0 + r, tile.x0);
  for (int i = 0; i < tile.lanes; ++i) lanes[i] = from[i * g.stride(view)];
  return lanes;
}

template <class E, class T>
void backward_tile(const Params& p, const Group& g, const BackwardScratch<T>& w, const Tile<T>& tile) {
  constexpr int L = kLanes<T>;
  const int d = p.head_dim, dv = p.value_dim;
  const bool logits = p.grad_q || p.grad_k || p.grad_rpb;
  for (int r = 0; r < tile.rows; ++r) {
    g.prefetch<E>(p.q, tile.y0 + r, tile.x0 + L, L, d);
    if (p.grad_out) g.prefetch<E>(p.grad_out, tile.y0 + r, tile.x0 + L, L, dv);
    pack(w.q + r * d * L, L, g.token<const E>(p.q, tile.y0 + r, tile.x0), p.q.stride[4], g.stride(p.q), d,
         tile.lanes, static_cast<T>(p.scale));
    if (p.grad_out)
      pack(w.grad_out + r * dv * L, L, g.token<const E>(p.grad_out, tile.y0 + r, tile.x0),
           p.grad_out.stride[4], g.stride(p.grad_out), dv, tile.lanes, T(1));
  }
  tile.correlate(w.p, w.q, w.k);
  if (logits && p.grad_out) tile.correlate(w.dl, w.grad_out, w.v);
  for (int r = 0; r < tile.rows; ++r) {
    if (logits && !p.grad_out)
      for (T *at = tile.row(w.dl, r), *end = at + tile.keys(r) * L; at < end; at += L) store(at, Vec<T>{});
    const Vec<T> rest = p.grad_lse ? -read_lanes<T>(g, p.grad_lse, tile, r) : Vec<T>{};
    tile.probabilities(w.p, logits ? w.dl : nullptr, r, p.rpb ? w.bias : nullptr,
                       read_lanes<T>(g, p.lse, tile, r), rest);
  }
  if (p.grad_v && p.grad_out) tile.scatter(w.grad_v, w.p, w.grad_out);
  if (p.grad_k) tile.scatter(w.grad_k, w.dl, w.q);
  if (p.grad_q) {
    tile.accumulate(w.grad_q, w.dl, w.k);
    for (int r = 0; r < tile.rows; ++r)
      unpack(g.token<E>(p.grad_q, tile.y0 + r, tile.x0), p.grad_q.stride[4], g.stride(p.grad_q),
             w.grad_q + r * d * L, L, d, tile.lanes, w.scales);
  }
  if (p.grad_rpb)
    for (int r = 0; r < tile.rows; ++r)
      tile.entries(w.dl, r, [&](const T* at, int entry, int) {
        T* sum = w.grad_bias + entry * L;
        store(sum, load(sum) + load(at));
      });
}

template <class E, class T>
void backward_group(const Params& p, const Group& g, const BackwardScratch<T>& w) {
  int y = 0, read = 0, written = 0;
  const auto write_until = [&](int end) {
    for (; written < end; ++written) {
      if (p.grad_k) w.grad_k.template write<E>(g, p.grad_k, written, w.ones);
      if (p.grad_v) w.grad_v.template write<E>(g, p.grad_v, written, w.ones);
    }
  };
  for (int tiles = ceil_div(g.y.size, kRows); tiles > 0; --tiles) {
    const int rows = ceil_div(g.y.size - y, tiles);
    write_until(g.y.first(y));  // before their places in the ring are taken
    for (; read < g.y.last(y + rows - 1); ++read) {
      w.k.template read<E>(g, p.k, read);
      if (p.grad_out) w.v.template read<E>(g, p.v, read);
      w.grad_k.clear_row(read);
      w.grad_v.clear_row(read);
    }
    for (int x = 0; x < g.x.size; x += kLanes<T>)
      backward_tile<E, T>(p, g, w, Tile<T>(g, y, rows, x, w.mask));
    y += rows;
  }
  write_until(g.y.size);
}

template <class E>
void backward_range(const Params& p, int64_t begin, int64_t end, void* memory, void* partials) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  const BackwardScratch<T> w(p, Scratch(memory));
  const int entries = p.entries();
  w.k.clear();
  w.v.clear();
  for (int i = 0; i < w.k.columns; ++i) w.ones[i] = 1;
  for (int i = 0; i < L; ++i) w.scales[i] = static_cast<T>(p.scale);
  const int64_t chunk = chunk_groups(p), groups = group_count(p);
  for (int64_t item = begin; item < end; ++item) {
    const int head = static_cast<int>(item % p.heads);
    const int64_t c = item / p.heads, last = (c + 1) * chunk < groups ? (c + 1) * chunk : groups;
    if (p.rpb) read_bias(p, head, w.bias);
    for (int i = 0; p.grad_rpb && i < entries * L; ++i) w.grad_bias[i] = 0;
    for (int64_t i = c * chunk; i < last; ++i) backward_group<E, T>(p, Group(p, i, head), w);
    T* to = static_cast<T*>(partials) + item * entries;
    for (int i = 0; p.grad_rpb && i < entries; ++i) to[i] = across<T>(load(w.grad_bias + i * L));
  }
}

// ---- by dtype

int64_t forward_items(const Params& p) {
  return group_count(p) * bands(p) * p.heads;
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

extern const CpuKernel kShifted;
const CpuKernel kShifted = {forward_items,    forward_scratch, forward,  backward_items,
                            backward_scratch, partials_size,   backward, reduce_partials};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::neighborhood_attention
