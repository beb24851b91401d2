// The backward pass of a chunk of windows, on one thread.
//
// As in the forward pass tokens are the lanes. Heads are undone last to first, each from the map and the
// saved output of the head before it; probabilities are recomputed. The gradients of the weights are sums
// over tokens, so those products have the tokens as their depth and input channels in the lanes.
#pragma once
#include "forward_cpu.h"

namespace vitkernels::cascaded_group_attention {
namespace VITKERNELS_ISA {

// A chunk's share of the gradients of weights, biases and table. Rows are padded to whole vectors.
template <class T>
struct Partial {
  ptrdiff_t qkv_row, proj_row, taps, entries;
  T *qkv, *qkv_bias, *dw, *dw_bias, *table, *proj, *proj_bias;
  size_t size;

  Partial(const Params& p, Scratch scratch) {
    const size_t h = p.num_heads, rows = p.qkv_rows(), c = p.channels;
    qkv_row = round_up_lanes<T>(p.value_dim());
    proj_row = round_up_lanes<T>(p.channels);
    taps = static_cast<ptrdiff_t>(p.kernel_max) * p.kernel_max;
    entries = p.tokens();
    qkv = scratch.take<T>(h * rows * qkv_row);
    qkv_bias = scratch.take<T>(h * rows);
    dw = scratch.take<T>(h * p.key_dim * taps);
    dw_bias = scratch.take<T>(h * p.key_dim);
    table = scratch.take<T>(h * entries);
    proj = scratch.take<T>(c * proj_row);
    proj_bias = scratch.take<T>(c);
    size = scratch.used;
  }
};

template <class T>
struct BackwardOwn {
  WindowBias<T> bias_table, grad_table;
  Depthwise<T> queries, gradients;
  int64_t* place;
  ptrdiff_t row, channel_row, value_row, key_row;
  int width;
  T *grad_out, *dz, *x, *o, *y, *q, *dy, *du, *relu_z, *u_tokens;  // of the group
  T *k, *v, *k_tokens, *dq_tokens, *tile, *bias, *p, *dl, *zeros;  // of a window
  T *grad_bias, *tap_sums, *flipped;                               // of a head, or summed over the chunk
  size_t size;

  BackwardOwn(const Params& params, int windows, Scratch scratch)
      : bias_table(params.window_h, params.window_w, false, true, scratch),
        grad_table(params.window_h, params.window_w, false, true, scratch),
        queries(params, params.key_dim, scratch),
        gradients(params, params.key_dim, scratch) {
    const size_t wide = group_row<T>(params, windows), n = params.tokens(), c = params.channels;
    const size_t d = params.value_dim(), rows = params.qkv_rows(), kd = params.key_dim, h = params.num_heads;
    width = round_up_lanes<T>(params.tokens());
    row = static_cast<ptrdiff_t>(wide);
    channel_row = round_up_lanes<T>(params.channels);
    value_row = round_up_lanes<T>(params.value_dim());
    key_row = round_up_lanes<T>(params.key_dim);
    place = scratch.take<int64_t>(wide);
    grad_out = scratch.take<T>(c * wide);
    dz = scratch.take<T>(c * wide);
    x = scratch.take<T>(d * wide);
    o = scratch.take<T>(d * wide);
    y = scratch.take<T>(rows * wide);
    q = scratch.take<T>(kd * wide);
    dy = scratch.take<T>(rows * wide);
    du = scratch.take<T>(d * wide);
    relu_z = scratch.take<T>(wide * channel_row);
    u_tokens = scratch.take<T>(wide * value_row);
    k = scratch.take<T>(kd * width);
    v = scratch.take<T>(d * width);
    k_tokens = scratch.take<T>(n * key_row);
    dq_tokens = scratch.take<T>(n * key_row);
    // A window's rows are read by whole vectors.
    tile = scratch.take<T>((d > kd ? d : kd) * width + kLanes<T>);
    bias = scratch.take<T>(n * width + kLanes<T>);
    p = scratch.take<T>(n * width);
    dl = scratch.take<T>(n * width);
    zeros = scratch.take<T>(n);
    grad_bias = scratch.take<T>(params.grad_attn_bias ? h * n * width : 0);
    tap_sums = scratch.take<T>(
        params.grad_dw_weight ? h * kd * params.kernel_max * params.kernel_max * kLanes<T> : 0);
    flipped = scratch.take<T>(static_cast<size_t>(params.kernel_max) * params.kernel_max);
    size = scratch.used;
  }
};

template <class T>
VITKERNELS_INLINE void clear(T* to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = 0;
}

// to[r] += sum of row r's first `count` lanes
template <class T>
static void add_row_sums(T* to, const T* from, ptrdiff_t row, int rows, int count) {
  const int whole = count / kLanes<T> * kLanes<T>;
  for (int r = 0; r < rows; ++r, from += row) {
    Vec<T> sum = {};
    for (int i = 0; i < whole; i += kLanes<T>) sum += load(from + i);
    if (whole < count) sum += load_first(from + whole, count - whole);
    to[r] += across<T>(sum);
  }
}

// What depends on the type of the arithmetic alone, T, and is compiled once for all tensors that compute in
// it.
template <class T>
struct BackwardHeads {
  const Params& p;
  const Weights<T> weights;
  const BackwardOwn<T> own;
  const Partial<T> partial;

  BackwardHeads(const Params& p, const void* shared, void* mine, void* partials, int group)
      : p(p),
        weights(p, const_cast<void*>(shared)),
        own(p, group, Scratch(mine)),
        partial(p, Scratch(partials)) {}

  int dim() const { return p.value_dim(); }
  T* head_grad_bias(int head) const {
    return own.grad_bias + static_cast<size_t>(head) * p.tokens() * own.width;
  }
  T* head_tap_sums(int head) const {
    return own.tap_sums + static_cast<size_t>(head) * p.key_dim * partial.taps * kLanes<T>;
  }

  // Live taps from the head's vectors of sums; dead ones stay 0.
  void fold_taps(int head) const {
    const int size = p.kernel_sizes[head], dead = p.dead_taps(head);
    const T* sums = head_tap_sums(head);
    for (int c = 0; c < p.key_dim; ++c) {
      T* to = partial.dw + (static_cast<ptrdiff_t>(head) * p.key_dim + c) * partial.taps;
      for (int y = 0; y < size; ++y)
        for (int x = 0; x < size; ++x, sums += kLanes<T>)
          to[(y + dead) * p.kernel_max + x + dead] = across<T>(load(sums));
    }
  }

  // dy = the gradient of (q before its depthwise convolution, k, v), and what becomes of table and taps.
  void attention(int windows, int head, const T* grad) const {
    const int n = p.tokens(), d = dim(), kd = p.key_dim, width = own.width, size = p.kernel_sizes[head];
    const ptrdiff_t row = own.row, dead = p.dead_taps(head);
    const T* taps = weights.dw.data + head * weights.dw.stride[0] + dead * (weights.dw.stride[2] + 1);
    const T* shifts = weights.dw_bias.data + head * weights.dw_bias.stride[0];
    WindowBias<T> table = own.bias_table;
    table.read(p.table_dtype, p.attn_bias, head);
    table.expand(own.bias, n, 0, n, width);
    const T scale = static_cast<T>(p.scale);
    for (int w = 0; w < windows; ++w) {
      const ptrdiff_t lane = static_cast<ptrdiff_t>(w) * n;
      own.queries.fill(own.y + lane, row, kd);
      for (int c = 0; c < kd; ++c)
        own.queries.convolve(c, size, taps + c * weights.dw.stride[1], weights.dw.stride[2], shifts[c], scale,
                             own.q + c * row + lane);
      pack(own.k, width, own.y + kd * row + lane, row, 1, kd, n, T(1));
      pack(own.v, width, own.y + 2 * kd * row + lane, row, 1, d, n, T(1));
      const Matrix<const T> q = {own.q + lane, 1, row}, out = {grad + lane, 1, row};
      const BackwardTile<T> task{n,        width,   n,         0,    kd,    d,      own.k,   own.v,
                                 own.bias, nullptr, own.zeros, true, own.p, own.dl, nullptr, nullptr};
      task.run(q, out);
      if (p.grad_attn_bias) {
        T* sum = head_grad_bias(head);
        for (int i = 0; i < n * width; i += kLanes<T>) store(sum + i, load(sum + i) + load(own.dl + i));
      }
      task.sum_queries(out, d, own.p, nullptr, own.tile);
      place(own.tile, width, d, own.dy + 2 * kd * row + lane);
      task.sum_queries(q, kd, own.dl, nullptr, own.tile);
      place(own.tile, width, kd, own.dy + kd * row + lane);

      pack(own.k_tokens, static_cast<int>(own.key_row), own.k, 1, width, n, kd, scale);
      multiply<T>(
          static_cast<int>(own.key_row / kLanes<T>),
          {n, n, own.dl, width, 1, own.k_tokens, own.key_row, nullptr, 0, own.dq_tokens, own.key_row});
      pack(own.tile, width, own.dq_tokens, 1, own.key_row, kd, n, T(1));
      depthwise(head, taps, own.dy + lane);
    }
  }

  // Rows of a window's tile to its lanes of the group, in window order: the overhang is the next window's.
  void place(const T* tile, int width, int rows, T* to) const {
    for (int c = 0; c < rows; ++c)
      for (int i = 0; i < width; i += kLanes<T>)
        store(to + c * own.row + i, load(tile + static_cast<ptrdiff_t>(c) * width + i));
  }

  // The depthwise convolution's gradients, its output's being in own.tile.
  void depthwise(int head, const T* taps, T* to) const {
    const int n = p.tokens(), kd = p.key_dim, size = p.kernel_sizes[head];
    if (p.grad_dw_bias)
      add_row_sums(partial.dw_bias + static_cast<ptrdiff_t>(head) * kd, own.tile, own.width, kd, n);
    own.gradients.fill(own.tile, own.width, kd);
    for (int c = 0; c < kd; ++c, taps += weights.dw.stride[1]) {
      if (p.grad_dw_weight)
        own.queries.correlate(own.gradients, c, size,
                              head_tap_sums(head) + static_cast<ptrdiff_t>(c) * size * size * kLanes<T>);
      for (int y = 0; y < size; ++y)
        for (int x = 0; x < size; ++x)
          own.flipped[(size - 1 - y) * size + size - 1 - x] = taps[y * weights.dw.stride[2] + x];
      own.gradients.convolve(c, size, own.flipped, size, T(0), T(1), to + c * own.row);
    }
  }
};

template <class E>
struct Backward : BackwardHeads<Compute<E>> {
  using T = Compute<E>;
  using Heads = BackwardHeads<T>;
  using Heads::dim, Heads::fold_taps, Heads::head_grad_bias, Heads::head_tap_sums;
  using Heads::Heads;
  using Heads::p, Heads::weights, Heads::own, Heads::partial;

  void run(int64_t first, int64_t count, int group) const {
    clear(partial.qkv, partial.size / sizeof(T));
    clear(own.zeros, p.tokens());
    own.queries.clear();
    own.gradients.clear();
    if (p.grad_attn_bias) clear(own.grad_bias, static_cast<size_t>(p.num_heads) * p.tokens() * own.width);
    if (p.grad_dw_weight)
      clear(head_tap_sums(0), static_cast<size_t>(p.num_heads) * p.key_dim * partial.taps * kLanes<T>);
    for (int64_t done = 0; done < count; done += group) {
      const int some = static_cast<int>(count - done < group ? count - done : group);
      run_group({p, first + done, some, own.place});
    }
    WindowBias<T> grad_table = own.grad_table;
    for (int head = 0; head < p.num_heads; ++head) {
      if (p.grad_attn_bias) {
        grad_table.clear();
        grad_table.collect(head_grad_bias(head), p.tokens(), 0, p.tokens(), own.width);
        grad_table.fold(partial.table + head * partial.entries, p.tokens());
      }
      if (p.grad_dw_weight) fold_taps(head);
    }
  }

  // Channels [from, from + count) of a saved tensor [window][token][channel], tokens in the lanes.
  void load_saved(const View& saved, const WindowGroup<E>& g, int from, int count, T* to) const {
    const E* data = static_cast<const E*>(saved.data) + g.first * saved.stride[0] + from * saved.stride[2];
    for (int w = 0; w < g.count; ++w)
      pack(to + static_cast<ptrdiff_t>(w) * p.tokens(), static_cast<int>(own.row), data + w * saved.stride[0],
           saved.stride[2], saved.stride[1], count, p.tokens(), T(1));
  }

  void run_group(const WindowGroup<E>& g) const {
    const int lanes = g.lanes(), c = p.channels, vecs = round_up_lanes<T>(lanes) / kLanes<T>;
    if (p.grad_out) {
      g.load_channels(p.grad_out, 0, c, own.grad_out, own.row);
      if (p.grad_proj_weight) {
        load_relu(g);
        multiply<T>(static_cast<int>(partial.proj_row / kLanes<T>),
                    {c, lanes, own.grad_out, own.row, 1, own.relu_z, own.channel_row, partial.proj,
                     partial.proj_row, partial.proj, partial.proj_row});
      }
      if (p.grad_proj_bias) add_row_sums(partial.proj_bias, own.grad_out, own.row, c, lanes);
      multiply<T>(vecs, {c, c, weights.proj.data, 1, weights.proj.stride[0], own.grad_out, own.row, nullptr,
                         0, own.dz, own.row});
    } else {
      clear(own.dz, static_cast<size_t>(c) * own.row);
      clear(own.grad_out, static_cast<size_t>(c) * own.row);
    }
    if (!(p.grad_x || p.grad_qkv_weight || p.grad_qkv_bias || p.grad_dw_weight || p.grad_dw_bias ||
          p.grad_attn_bias))
      return;
    for (int head = p.num_heads - 1; head >= 0; --head) run_head(g, head, lanes, vecs);
  }

  // relu_z[token][channel]
  void load_relu(const WindowGroup<E>& g) const {
    for (int w = 0; w < g.count; ++w) {
      const E* from = static_cast<const E*>(p.heads.data) + (g.first + w) * p.heads.stride[0];
      pack(own.relu_z + static_cast<ptrdiff_t>(w) * p.tokens() * own.channel_row,
           static_cast<int>(own.channel_row), from, p.heads.stride[1], p.heads.stride[2], p.tokens(),
           p.channels, T(1));
    }
    for (ptrdiff_t i = 0; i < g.lanes() * own.channel_row; i += kLanes<T>)
      store(own.relu_z + i, vmax(Vec<T>{}, load(own.relu_z + i)));
  }

  void run_head(const WindowGroup<E>& g, int head, int lanes, int vecs) const {
    const int d = dim(), rows = p.qkv_rows();
    const ptrdiff_t row = own.row;
    // The gradient of this head's output: through the projection where ReLU let it pass, from the next head's
    // input, and from the saved heads themselves.
    T* grad = own.dz + static_cast<ptrdiff_t>(head) * d * row;
    load_saved(p.heads, g, head * d, d, own.o);
    const bool last = head + 1 == p.num_heads;
    for (int c = 0; c < d; ++c)
      for (int i = 0; i < vecs * kLanes<T>; i += kLanes<T>) {
        T* at = grad + c * row + i;
        const Vec<T> through = load(own.o + c * row + i) > T(0) ? load(at) : Vec<T>{};
        store(at, last ? through : through + load(own.du + c * row + i));
      }
    if (p.grad_heads) {
      load_saved(p.grad_heads, g, head * d, d, own.o);
      for (ptrdiff_t i = 0; i < d * row; i += kLanes<T>) store(grad + i, load(grad + i) + load(own.o + i));
    }

    g.load_channels(p.x, head * d, d, own.x, row);
    if (head > 0) {
      load_saved(p.heads, g, (head - 1) * d, d, own.o);
      for (ptrdiff_t i = 0; i < d * row; i += kLanes<T>) store(own.x + i, load(own.o + i) + load(own.x + i));
    }
    const T* w = weights.qkv.data + head * weights.qkv.stride[0];
    multiply<T>(vecs, {rows, d, w, weights.qkv.stride[1], 1, own.x, row, nullptr, 0, own.y, row,
                       weights.qkv_bias.data + head * weights.qkv_bias.stride[0]});
    this->attention(g.count, head, grad);

    if (p.grad_qkv_bias)
      add_row_sums(partial.qkv_bias + static_cast<ptrdiff_t>(head) * rows, own.dy, row, rows, lanes);
    if (p.grad_qkv_weight) {
      pack(own.u_tokens, static_cast<int>(own.value_row), own.x, 1, row, lanes, d, T(1));
      T* sum = partial.qkv + static_cast<ptrdiff_t>(head) * rows * partial.qkv_row;
      multiply<T>(static_cast<int>(partial.qkv_row / kLanes<T>),
                  {rows, lanes, own.dy, row, 1, own.u_tokens, own.value_row, sum, partial.qkv_row, sum,
                   partial.qkv_row});
    }
    if (head == 0 && !p.grad_x) return;
    multiply<T>(vecs, {d, rows, w, 1, weights.qkv.stride[1], own.dy, row, nullptr, 0, own.du, row});
    if (!p.grad_x) return;
    const T* result = own.du;
    if (p.residual) {
      const T* direct = own.grad_out + static_cast<ptrdiff_t>(head) * d * row;
      for (ptrdiff_t i = 0; i < d * row; i += kLanes<T>)
        store(own.o + i, load(own.du + i) + load(direct + i));
      result = own.o;
    }
    g.store_channels(p.grad_x, {}, head * d, d, result, row);
  }
};

// ---- the sum over chunks

// to[i * stride] = sum over chunks of from[i]
template <class T, class W>
static void reduce_row(W* to, ptrdiff_t stride, const T* from, size_t chunk, int chunks, int count) {
  for (int i = 0; i < count; ++i) {
    T sum = 0;
    for (int c = 0; c < chunks; ++c) sum += from[c * chunk + i];
    store_one(to + i * stride, static_cast<Compute<W>>(sum));
  }
}

template <class T, class W>
struct Reduce {
  const Params& p;
  const Partial<T> first;
  size_t chunk;
  int chunks;

  void row(const View& view, ptrdiff_t offset, ptrdiff_t stride, const T* from, int count) const {
    if (view) reduce_row<T, W>(static_cast<W*>(view.data) + offset, stride, from, chunk, chunks, count);
  }

  // Rows: of the projection, of each head's 1x1 convolution, of its depthwise kernels; then the biases at
  // once.
  void run(int r) const {
    const int h = p.num_heads, rows = p.qkv_rows(), k = p.key_dim, c = p.channels, side = p.kernel_max;
    if (r < c)
      return row(p.grad_proj_weight, r * p.grad_proj_weight.stride[0], p.grad_proj_weight.stride[1],
                 first.proj + r * first.proj_row, c);
    r -= c;
    if (r < h * rows) {
      const int64_t* s = p.grad_qkv_weight.stride;
      return row(p.grad_qkv_weight, r / rows * s[0] + r % rows * s[1], s[2], first.qkv + r * first.qkv_row,
                 p.value_dim());
    }
    r -= h * rows;
    if (r < h * k) {
      const int64_t* s = p.grad_dw_weight.stride;
      for (int y = 0; y < side; ++y)
        row(p.grad_dw_weight, r / k * s[0] + r % k * s[1] + y * s[2], s[3],
            first.dw + r * first.taps + y * side, side);
      return;
    }
    for (int i = 0; i < h; ++i) {
      row(p.grad_qkv_bias, i * p.grad_qkv_bias.stride[0], p.grad_qkv_bias.stride[1],
          first.qkv_bias + i * rows, rows);
      row(p.grad_dw_bias, i * p.grad_dw_bias.stride[0], p.grad_dw_bias.stride[1], first.dw_bias + i * k, k);
    }
    row(p.grad_proj_bias, 0, p.grad_proj_bias.stride[0], first.proj_bias, c);
  }
};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::cascaded_group_attention
