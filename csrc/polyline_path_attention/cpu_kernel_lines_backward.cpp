// Criss-cross polyline path attention, backward, on one core and one instruction set.
//
// Floor of a map of N tokens: 2 N (H + W) (3 d + 4 dv) FLOPs and N (H + W) exponentials; the rows'
// probabilities are computed twice. With G = grad_out / 2, Y1 = A_w v, Y2 = A_h v:
//   rows      dY2 = A_w^T G
//   columns   dA_h = G Y1^T + dY2 v^T, dY1 = A_h^T G, and what v, q, k and log_decay_h get through A_h
//   rows      dA_w = dY1 v^T + G Y2^T, and what v, q, k and log_decay_w get through A_w
// A line has one owner and holds all its keys, so the softmax's own sum is taken from the probabilities. What
// passes from sweep to sweep is kept as it was accumulated, [batch][head][y][x][channel].
#include "lines_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {
namespace {

constexpr int kQueries = 32;  // in a tile: two matrices of them and of all keys of a line

// dY1, dY2 and the gradients of q, k and v so far.
template <class T>
struct Between {
  int height, width, d_pitch, v_pitch;
  int64_t heads, tokens;
  T *dy1, *dy2, *dq, *dk, *dv;

  Between(const Params& p, void* memory)
      : height(p.height),
        width(p.width),
        d_pitch(round_up_lanes<T>(p.head_dim)),
        v_pitch(round_up_lanes<T>(p.value_dim)),
        heads(p.heads),
        tokens(static_cast<int64_t>(p.height) * p.width) {
    const int64_t all = p.batch * heads * tokens;
    dy1 = static_cast<T*>(memory);
    dy2 = dy1 + all * v_pitch;
    dv = dy2 + all * v_pitch;
    dq = dv + all * v_pitch;
    dk = dq + all * d_pitch;
  }
  T* token(T* tensor, int pitch, const Line& line, int i) const {
    const int64_t at = line.vertical ? static_cast<int64_t>(i) * width + line.index
                                     : static_cast<int64_t>(line.index) * width + i;
    return tensor + ((line.batch * heads + line.head) * tokens + at) * pitch;
  }
};

template <class T>
struct BackwardScratch {
  int width, d_pitch, v_pitch, pair;
  T *sums, *q, *k, *k_lanes, *v_lanes, *g, *mask, *p, *dl, *lse, *delta, *dq, *dk, *dv, *dsums, *ones,
      *scales;
  size_t size;

  BackwardScratch(const Params& params, int sweep, Scratch scratch)
      : width(round_up_lanes<T>(line_length(params, sweep))),
        d_pitch(round_up_lanes<T>(params.head_dim)),
        v_pitch(round_up_lanes<T>(params.value_dim)),
        pair(pair_pitch<T>(params)) {
    const size_t n = line_length(params, sweep), dv_channels = 2 * params.value_dim;
    sums = scratch.take<T>(width);
    q = scratch.take<T>(n * d_pitch);
    k = scratch.take<T>(n * d_pitch);
    k_lanes = scratch.take<T>(params.head_dim * width);
    v_lanes = scratch.take<T>(dv_channels * width);
    g = scratch.take<T>(n * pair);
    mask = scratch.take<T>(kQueries * width);
    p = scratch.take<T>(kQueries * width);
    dl = scratch.take<T>(kQueries * width);
    lse = scratch.take<T>(n);
    delta = scratch.take<T>(kQueries);
    dq = scratch.take<T>(n * d_pitch);
    dk = scratch.take<T>(n * d_pitch);
    dv = scratch.take<T>(n * pair);
    dsums = scratch.take<T>(width);
    ones = scratch.take<T>(pair + d_pitch);
    scales = scratch.take<T>(pair + d_pitch);
    size = scratch.used;
  }
};

template <class T>
void copy_channels(T* to, const T* from, int channels) {
  for (int c = 0; c < channels; ++c) to[c] = from[c];
}

// dsums[p] += sum_t later(p, t) (dl[p][t] + dl[t][p]) over the queries [first, first + count).
template <class T>
void add_to_sums(const T* dl, int first, int count, int width, T* dsums) {
  constexpr int L = kLanes<T>;
  for (int r = 0; r < count; ++r) {
    const T* row = dl + static_cast<ptrdiff_t>(r) * width;
    Vec<T> sum = {};
    IntVec<T> lanes = positions_from<T>(0);
    for (int i = 0; i < width; i += L, lanes += L) {
      const Vec<T> directed = towards<T>(load(row + i), lanes, first + r);
      store(dsums + i, load(dsums + i) + directed);
      sum += directed;
    }
    dsums[first + r] -= across<T>(sum);
  }
}

// A line's tensors into scratch: g = [what the first product gets | the second], v_lanes likewise.
template <class E, class T>
void read_line(const Params& p, int sweep, const Line& line, const Between<T>& between,
               const BackwardScratch<T>& w) {
  const int n = line.length, dv = p.value_dim;
  line.read_sums(p, w.sums, w.width);
  line.template read<E>(p.q, p.head_dim, static_cast<T>(p.scale), w.q, w.d_pitch);
  line.template read_lanes<E>(p.k, 0, n, p.head_dim, T(1), w.k_lanes, w.width);
  const T* lse = line.template lse<const T>(p);
  for (int i = 0; i < n; ++i) w.lse[i] = lse[i * line.lse_step(p)];
  if (sweep == 0) return line.template read<E>(p.grad_out, dv, T(0.5), w.g, w.pair);
  line.template read<E>(p.k, p.head_dim, T(1), w.k, w.d_pitch);
  T* second = w.v_lanes + static_cast<ptrdiff_t>(dv) * w.width;
  if (sweep == 1) {
    line.template read_lanes<E>(saved_product<E>(p, 0), 0, n, dv, T(1), w.v_lanes, w.width);
    line.template read_lanes<E>(p.v, 0, n, dv, T(1), second, w.width);
    line.template read<E>(p.grad_out, dv, T(0.5), w.g, w.pair);
    for (int i = 0; i < n; ++i)
      copy_channels(w.g + i * w.pair + dv, between.token(between.dy2, w.v_pitch, line, i), dv);
  } else {
    line.template read_lanes<E>(p.v, 0, n, dv, T(1), w.v_lanes, w.width);
    line.template read_lanes<E>(saved_product<E>(p, 1), 0, n, dv, T(1), second, w.width);
    line.template read<E>(p.grad_out, dv, T(0.5), w.g + dv, w.pair);
    for (int i = 0; i < n; ++i)
      copy_channels(w.g + i * w.pair, between.token(between.dy1, w.v_pitch, line, i), dv);
  }
}

// Probabilities alone, of one tile of queries.
template <class T>
void find_probabilities(const Params& params, int queries, const T* q, const T* lse,
                        const BackwardScratch<T>& w) {
  multiply<T>(w.width / kLanes<T>,
              {queries, params.head_dim, q, w.d_pitch, 1, w.k_lanes, w.width, w.mask, w.width, w.p, w.width});
  for (int r = 0; r < queries; ++r)
    for (int i = 0; i < w.width; i += kLanes<T>) {
      T* at = w.p + static_cast<ptrdiff_t>(r) * w.width + i;
      store(at, exp_softmax<T>(load(at) - lse[r]));
    }
}

// The line's share of all gradients, into w.dq, w.dk, w.dv and w.dsums.
template <class T>
void differentiate(const Params& params, int sweep, int n, bool logits, bool decays,
                   const BackwardScratch<T>& w) {
  constexpr int L = kLanes<T>;
  const int dv = params.value_dim;
  for (int i = 0; i < w.width; ++i) w.dsums[i] = 0;
  for (int i = 0; i < kQueries; ++i) w.delta[i] = 0;  // the tile finds its own
  int first = 0;
  for (int tiles = ceil_div(n, kQueries); tiles > 0; --tiles) {
    const int queries = ceil_div(n - first, tiles);
    const T *q = w.q + static_cast<ptrdiff_t>(first) * w.d_pitch,
            *g = w.g + static_cast<ptrdiff_t>(first) * w.pair;
    fill_mask(w.sums, first, queries, 0, w.width, w.mask);
    if (logits && sweep > 0) {
      const BackwardTile<T> task{
          queries, w.width, n,   0,    params.head_dim, 2 * dv, w.k_lanes, w.v_lanes, w.mask, w.lse + first,
          w.delta, true,    w.p, w.dl, nullptr,         nullptr};
      task.run({q, w.d_pitch, 1}, {g, w.pair, 1});
      if (params.grad_q)
        multiply<T>(w.d_pitch / L, {queries, n, w.dl, w.width, 1, w.k, w.d_pitch, nullptr, 0,
                                    w.dq + static_cast<ptrdiff_t>(first) * w.d_pitch, w.d_pitch});
      if (params.grad_k)
        multiply<T>(w.d_pitch / L, {n, queries, w.dl, 1, w.width, q, w.d_pitch, first ? w.dk : nullptr,
                                    w.d_pitch, w.dk, w.d_pitch});
      if (decays) add_to_sums(w.dl, first, queries, w.width, w.dsums);
    } else {
      find_probabilities(params, queries, q, w.lse + first, w);
    }
    const int channels = sweep == 1 ? 2 * dv : dv;
    multiply<T>(round_up_lanes<T>(channels) / L,
                {n, queries, w.p, 1, w.width, g, w.pair, first ? w.dv : nullptr, w.pair, w.dv, w.pair});
    first += queries;
  }
}

template <class T>
void add_channels(T* to, const T* from, int channels) {
  for (int c = 0; c < channels; ++c) to[c] += from[c];
}

template <class E, class T>
void backward_line(const Params& p, int sweep, const Line& line, const Between<T>& between,
                   const BackwardScratch<T>& w) {
  const int n = line.length, dv = p.value_dim;
  const bool decays = p.grad_log_decay_w || p.grad_log_decay_h, logits = decays || p.grad_q || p.grad_k;
  read_line<E>(p, sweep, line, between, w);
  differentiate(p, sweep, n, logits, decays, w);
  for (int i = 0; i < n; ++i) {
    const T* mine = w.dv + static_cast<ptrdiff_t>(i) * w.pair;
    if (sweep == 0) {
      copy_channels(between.token(between.dy2, w.v_pitch, line, i), mine, dv);
      continue;
    }
    T *to_v = between.token(between.dv, w.v_pitch, line, i),
      *to_q = between.token(between.dq, w.d_pitch, line, i);
    T* to_k = between.token(between.dk, w.d_pitch, line, i);
    const T *dq = w.dq + static_cast<ptrdiff_t>(i) * w.d_pitch,
            *dk = w.dk + static_cast<ptrdiff_t>(i) * w.d_pitch;
    if (sweep == 1) {
      copy_channels(between.token(between.dy1, w.v_pitch, line, i), mine, dv);
      copy_channels(to_v, mine + dv, dv);
      if (p.grad_q) copy_channels(to_q, dq, p.head_dim);
      if (p.grad_k) copy_channels(to_k, dk, p.head_dim);
    } else {
      add_channels(to_v, mine, dv);
      if (p.grad_q) add_channels(to_q, dq, p.head_dim);
      if (p.grad_k) add_channels(to_k, dk, p.head_dim);
    }
  }
  const View& grad = line.vertical ? p.grad_log_decay_h : p.grad_log_decay_w;
  if (sweep > 0 && grad)
    by_decay<E>(p, [&](auto d) {
      using D = decltype(d);
      differentiate_sums(w.dsums, 1, n, line.template first<D>(grad), line.step(grad));
    });
  if (sweep < 2) return;
  const auto write = [&](const View& view, T* tensor, int pitch, int channels, const T* factors) {
    if (view)
      unpack(line.template first<E>(view), line.step(view), view.stride[4],
             between.token(tensor, pitch, line, 0), pitch, n, channels, factors);
  };
  write(p.grad_q, between.dq, w.d_pitch, p.head_dim, w.scales);
  write(p.grad_k, between.dk, w.d_pitch, p.head_dim, w.ones);
  write(p.grad_v, between.dv, w.v_pitch, dv, w.ones);
}

template <class E>
void backward_range(const Params& p, int sweep, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  const BackwardScratch<T> w(p, sweep, Scratch(memory));
  const Between<T> between(p, p.workspace);
  for (int i = 0; i < w.pair + w.d_pitch; ++i) {
    w.ones[i] = 1;
    w.scales[i] = static_cast<T>(p.scale);
  }
  for (int64_t item = begin; item < end; ++item) backward_line<E>(p, sweep, Line(p, item, sweep), between, w);
}

template <class E>
struct HeadScratch {
  View q, k, v, grad_out, out, products;
  void* between;
  char* sweeps;
  size_t size;

  HeadScratch(const Params& p, Scratch scratch) {
    using T = Compute<E>;
    const ptrdiff_t tokens = static_cast<ptrdiff_t>(p.height) * p.width;
    q = gathered<E>(p, p.head_dim, &scratch);
    k = gathered<E>(p, p.head_dim, &scratch);
    v = gathered<E>(p, p.value_dim, &scratch);
    grad_out = gathered<E>(p, p.value_dim, &scratch);
    out = grad_out;  // only its strides count, for those of the saved products
    products.data = scratch.take<E>(2 * tokens * p.value_dim);
    products.stride[0] = tokens * p.value_dim;
    const int d_pitch = round_up_lanes<T>(p.head_dim), v_pitch = round_up_lanes<T>(p.value_dim);
    between = scratch.take<T>(tokens * (2 * d_pitch + 3 * v_pitch));
    sweeps = scratch.base + scratch.used;
    size_t largest = 0;
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      const size_t needed = BackwardScratch<T>(p, sweep, Scratch(nullptr)).size;
      largest = needed > largest ? needed : largest;
    }
    size = scratch.used + largest;
  }
};

template <class E>
void backward_heads(const Params& p, int64_t begin, int64_t end, void* memory) {
  const HeadScratch<E> w(p, Scratch(memory));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t map = item / p.heads;
    const int head = static_cast<int>(item % p.heads);
    Params one = head_of<E>(p, map, head);
    one.q = w.q, one.k = w.k, one.v = w.v, one.grad_out = w.grad_out;
    one.out = w.out, one.partial = w.products, one.workspace = w.between;
    copy_head<E>(p, p.q, map, head, one.q, 0, 0, p.head_dim);
    copy_head<E>(p, p.k, map, head, one.k, 0, 0, p.head_dim);
    copy_head<E>(p, p.v, map, head, one.v, 0, 0, p.value_dim);
    copy_head<E>(p, p.grad_out, map, head, one.grad_out, 0, 0, p.value_dim);
    for (int i = 0; i < 2; ++i)
      copy_head<E>(p, saved_product<E>(p, i), map, head, saved_product<E>(one, i), 0, 0, p.value_dim);
    for (int sweep = 0; sweep < kSweeps; ++sweep)
      backward_range<E>(one, sweep, 0, sweep_items(one, sweep), w.sweeps);
  }
}

size_t head_scratch(const Params& p) {
  return by_dtype(p, [&](auto e) { return HeadScratch<decltype(e)>(p, Scratch(nullptr)).size; });
}
void backward_by_heads(const Params& p, int64_t begin, int64_t end, void* scratch) {
  by_dtype(p, [&](auto e) { backward_heads<decltype(e)>(p, begin, end, scratch); });
}

// ---- by sweep and dtype

template <int Sweep>
int64_t backward_items(const Params& p) {
  return sweep_items(p, Sweep);
}
template <int Sweep>
size_t backward_scratch(const Params& p) {
  return p.dtype == DType::f64 ? BackwardScratch<double>(p, Sweep, Scratch(nullptr)).size
                               : BackwardScratch<float>(p, Sweep, Scratch(nullptr)).size;
}
template <int Sweep>
void backward(const Params& p, int64_t begin, int64_t end, void* scratch) {
  by_dtype(p, [&](auto e) { backward_range<decltype(e)>(p, Sweep, begin, end, scratch); });
}

}  // namespace

const Loop kCrissCrossBackward[kSweeps] = {{backward_items<0>, backward_scratch<0>, backward<0>},
                                           {backward_items<1>, backward_scratch<1>, backward<1>},
                                           {backward_items<2>, backward_scratch<2>, backward<2>}};
const Loop kCrissCrossBackwardHeads{head_items, head_scratch, backward_by_heads};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention
