// The forward pass of a group of windows.
//
// Tokens of all windows of the group are the lanes of every matrix, channels its rows: the weights are then
// the broadcast operand of the products and are read as they lie, the map's rows are the scratch's rows, and
// 49 tokens leave no lanes empty once several windows follow each other. Logits never leave a tile.
#pragma once
#include "depthwise_cpu.h"
#include "vitkernels/tile_attention_cpu.h"
#include "vitkernels/window_bias_cpu.h"
#include "weights_cpu.h"
#include "window_map_cpu.h"

namespace vitkernels::cascaded_group_attention {
namespace VITKERNELS_ISA {

// How the queries of a window are split among the members of a team. Which queries are odd
// (tile_attention_cpu.h) does not depend on it, so that the split changes no bit.
template <class T>
struct QueryTiles {
  int tokens, odd, vecs, count;

  QueryTiles(int n, int parts) : tokens(n) {
    odd = n > kLanes<T> && n % kLanes<T> <= kLanes<T> / 8 ? n % kLanes<T> : 0;
    const int all = ceil_div(n - odd, kLanes<T>);
    vecs = imin(kTileWidth / kLanes<T>, ceil_div(all, parts));
    count = ceil_div(all, vecs);
  }
  int width() const { return (vecs + (odd ? 1 : 0)) * kLanes<T>; }
  int start(int tile) const { return tile * vecs * kLanes<T>; }
  int lanes(int tile) const { return tile + 1 < count ? vecs * kLanes<T> : tokens - start(tile); }
  int odd_of(int tile) const { return tile + 1 < count ? 0 : odd; }
  // The stride of the tile's matrices: its vectors, and one for the odd queries.
  int width_of(int tile) const {
    const int some = odd_of(tile);
    return round_up_lanes<T>(lanes(tile) - some) + (some ? kLanes<T> : 0);
  }
};

// Lanes of a group's matrices, with a vector of slack at the end of every row.
template <class T>
VITKERNELS_INLINE size_t group_row(const Params& p, int windows) {
  return round_up_lanes<T>(windows * p.tokens()) + kLanes<T>;
}

template <class T>
struct ForwardGroup {
  ptrdiff_t row;
  T *u, *y, *q, *z, *out;
  size_t size;

  ForwardGroup(const Params& p, int windows, Scratch scratch) {
    const size_t wide = group_row<T>(p, windows);
    row = static_cast<ptrdiff_t>(wide);
    u = scratch.take<T>(p.value_dim() * wide);
    y = scratch.take<T>(p.qkv_rows() * wide);
    q = scratch.take<T>(p.key_dim * wide);
    z = scratch.take<T>(p.channels * wide);
    out = scratch.take<T>(p.channels * wide);
    size = scratch.used;
  }
};

template <class T>
struct ForwardOwn {
  WindowBias<T> table;
  Depthwise<T> depthwise;
  bool cached;  // bias holds every head's tile, expanded for the thread's first group
  int64_t* place;
  T *bias, *s, *out, *inverse, *lse, *line;
  size_t size;

  ForwardOwn(const Params& p, int windows, Scratch scratch)
      : table(p.window_h, p.window_w, false, false, scratch), depthwise(p, p.key_dim, scratch) {
    const size_t n = p.tokens(), width = QueryTiles<T>(p.tokens(), 1).width();
    constexpr size_t kCachedLogits = 1 << 16;
    cached = QueryTiles<T>(p.tokens(), 1).count == 1 && p.num_heads * n * width <= kCachedLogits;
    bias = scratch.take<T>((cached ? p.num_heads : 1) * n * width + kLanes<T>);
    s = scratch.take<T>(n * width);
    out = scratch.take<T>(p.value_dim() * width);
    inverse = scratch.take<T>(width);
    lse = scratch.take<T>(width);
    line = scratch.take<T>(round_up_lanes<T>(p.tokens()));
    // Last, since a smaller last group must find the bias where the first one left it.
    place = scratch.take<int64_t>(group_row<T>(p, windows));
    size = scratch.used;
  }
};

// One team, one group of windows.
template <class E>
struct Forward {
  using T = Compute<E>;
  const Params& p;
  const Weights<T> weights;
  const ForwardGroup<T> g;
  const ForwardOwn<T> own;
  const WindowGroup<E> windows;
  const Team& team;
  const bool fresh;  // the thread's first group

  Forward(const Params& p, const void* shared, void* group, void* mine, int64_t first, int count,
          const Team& team, bool fresh)
      : p(p),
        weights(p, const_cast<void*>(shared)),
        g(p, count, Scratch(group)),
        own(p, count, Scratch(mine)),
        windows{p, first, count, own.place},
        team(team),
        fresh(fresh) {
    if (fresh) own.depthwise.clear();
  }

  int vecs() const { return round_up_lanes<T>(windows.lanes()) / kLanes<T>; }

  // to = w from + start, this member's share of the rows.
  void product(int rows, int depth, const T* w, ptrdiff_t w_row, const T* start, const T* from, T* to) const {
    const int begin = team.begin(rows), end = team.end(rows);
    multiply<T>(vecs(), {end - begin, depth, w + begin * w_row, w_row, 1, from, g.row, nullptr, 0,
                         to + begin * g.row, g.row, start + begin});
  }

  void load_share(int head) const {
    const int d = p.value_dim(), begin = team.begin(d), end = team.end(d);
    windows.load_channels(p.x, head * d + begin, end - begin, g.u + begin * g.row, g.row);
  }

  void depthwise(int head) const {
    const int begin = team.begin(p.key_dim), end = team.end(p.key_dim), dead = p.dead_taps(head);
    const int size = p.kernel_sizes[head], n = p.tokens();
    for (int w = 0; w < windows.count; ++w) {
      own.depthwise.fill(g.y + begin * g.row + w * n, g.row, end - begin);
      for (int c = begin; c < end; ++c) {
        const T* taps = weights.dw.data + head * weights.dw.stride[0] + c * weights.dw.stride[1] +
                        dead * (weights.dw.stride[2] + 1);
        own.depthwise.convolve(c - begin, size, taps, weights.dw.stride[2],
                               weights.dw_bias.data[head * weights.dw_bias.stride[0] + c],
                               static_cast<T>(p.scale), g.q + c * g.row + w * n);
      }
    }
  }

  void attention(int head) const {
    const QueryTiles<T> tiles(p.tokens(), windows.count < team.size ? ceil_div(team.size, windows.count) : 1);
    const int items = tiles.count * windows.count, n = p.tokens();
    const bool cached = own.cached && tiles.count == 1;
    T* bias = own.bias + (cached ? static_cast<ptrdiff_t>(head) * n * tiles.width() : 0);
    WindowBias<T> table = own.table;
    int expanded = cached && !fresh ? 0 : -1;
    for (int item = team.begin(items); item < team.end(items); ++item) {
      const int tile = item / windows.count, w = item % windows.count;
      const int start = tiles.start(tile), lanes = tiles.lanes(tile), width = tiles.width_of(tile);
      if (expanded != tile) {
        if (expanded < 0) table.read(p.table_dtype, p.attn_bias, head);
        table.expand(bias, n, start, lanes, width);
        expanded = tile;
      }
      const T* y = g.y + static_cast<ptrdiff_t>(w) * n;
      const Matrix<const T> k = {y + p.key_dim * g.row, 1, g.row}, v = {y + 2 * p.key_dim * g.row, 1, g.row};
      ForwardTile<T> task{n,
                          width,
                          tiles.odd_of(tile),
                          p.key_dim,
                          p.value_dim(),
                          g.q + static_cast<ptrdiff_t>(w) * n + start,
                          bias,
                          own.s,
                          own.out,
                          own.inverse,
                          own.lse,
                          own.line,
                          static_cast<int>(g.row)};
      task.run(k, v);
      take_output(head, w, start, lanes, width);
    }
  }

  // A tile's output to z through ReLU, to the next head's input, and to the saved heads.
  void take_output(int head, int w, int start, int lanes, int width) const {
    constexpr int L = kLanes<T>;
    const int d = p.value_dim(), whole = lanes / L * L;
    const ptrdiff_t lane = static_cast<ptrdiff_t>(w) * p.tokens() + start;
    const bool more = head + 1 < p.num_heads;
    for (int c = 0; c < d; ++c) {
      const T* from = own.out + static_cast<ptrdiff_t>(c) * width;
      T* z = g.z + (static_cast<ptrdiff_t>(head) * d + c) * g.row + lane;
      T* u = g.u + c * g.row + lane;
      for (int i = 0; i < whole; i += L) {
        const Vec<T> value = load(from + i) * load(own.inverse + i);
        store(z + i, vmax(Vec<T>{}, value));
        if (more) store(u + i, value + load(u + i));
      }
      for (int i = whole; i < lanes; ++i) {
        const T value = from[i] * own.inverse[i];
        z[i] = T(0) > value ? T(0) : value;
        if (more) u[i] = value + u[i];
      }
    }
    if (!p.heads) return;
    E* heads = static_cast<E*>(p.heads.data) + (windows.first + w) * p.heads.stride[0] +
               start * p.heads.stride[1] + static_cast<ptrdiff_t>(head) * d * p.heads.stride[2];
    unpack(heads, p.heads.stride[2], p.heads.stride[1], own.out, width, d, lanes, own.inverse);
  }

  void run() const {
    const int h = p.num_heads, rows = p.qkv_rows();
    load_share(0);
    for (int head = 0; head < h; ++head) {
      team.wait();
      product(rows, p.value_dim(), weights.qkv.data + head * weights.qkv.stride[0], weights.qkv.stride[1],
              weights.qkv_bias.data + head * weights.qkv_bias.stride[0], g.u, g.y);
      team.wait();
      depthwise(head);
      if (head + 1 < h) load_share(head + 1);
      team.wait();
      attention(head);
    }
    clear_padding();
    team.wait();
    product(p.channels, p.channels, weights.proj.data, weights.proj.stride[0], weights.proj_bias.data, g.z,
            g.out);
    const int begin = team.begin(p.channels), end = team.end(p.channels);
    windows.store_channels(p.out, p.residual ? p.x : View{}, begin, end - begin, g.out + begin * g.row,
                           g.row);
  }

  // Lanes beyond the last token are never read by a token, but what lies there must not slow the products
  // down.
  void clear_padding() const {
    const int begin = team.begin(p.channels), end = team.end(p.channels);
    for (int c = begin; c < end; ++c)
      for (int i = windows.lanes(); i < vecs() * kLanes<T>; ++i) g.z[c * g.row + i] = 0;
  }
};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::cascaded_group_attention
