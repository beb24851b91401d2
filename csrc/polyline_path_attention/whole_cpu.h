// What the forward and the backward pass over whole maps share: blocks of queries, and the masks as factors.
// Compiled once per instruction set.
//
// A block is one vector of columns of up to kBlockRows rows, queries in the lanes. Its keys go by row by row.
// e^(S + mask) is a product, e^S times a factor for the way along a row times one for the way down a column,
// and the factors are shared: `near` by all rows of keys, `drop` by all columns of queries, `far` by all rows
// of queries. So a score costs one exponential where it has two logits.
#pragma once
#include "maps_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {

constexpr int kBlockRows = kMaxVecs;

// Rows of keys at a time: as many keys as one run of a product, and few enough for L1.
VITKERNELS_INLINE int tile_rows(const Params& p) {
  return p.width >= 64 ? 1 : imin(p.height, 64 / p.width);
}

// One head: keys and values [token][channel], sums of decays [y][column], columns padded with the last one.
template <class T>
struct Map {
  int height, width, tokens, pitch, d, dv, d_pitch, dv_pitch;
  T *k, *v, *along, *down;

  Map(const Params& p, Scratch& scratch)
      : height(p.height),
        width(p.width),
        tokens(p.height * p.width),
        pitch(round_up_lanes<T>(p.width)),
        d(p.head_dim),
        dv(p.value_dim),
        d_pitch(round_up_lanes<T>(p.head_dim)),
        dv_pitch(round_up_lanes<T>(p.value_dim)) {
    k = scratch.take<T>(static_cast<size_t>(tokens) * d_pitch);
    v = scratch.take<T>(static_cast<size_t>(tokens) * dv_pitch);
    along = scratch.take<T>(static_cast<size_t>(height) * pitch);
    down = scratch.take<T>(static_cast<size_t>(height) * pitch);
  }
  template <class E>
  void read(const Params& p, int64_t batch, int head) const {
    read_map<E>(p, p.k, batch, head, d, T(1), k);
    read_map<E>(p, p.v, batch, head, dv, T(1), v);
    read_plane(plane<const T>(p.cum, 0, batch, head), along);
    read_plane(plane<const T>(p.cum, 1, batch, head), down);
  }
  void read_plane(const T* from, T* to) const {
    for (int y = 0; y < height; ++y, from += width, to += pitch)
      for (int x = 0; x < pitch; ++x) to[x] = from[imin(x, width - 1)];
  }
  const T* along_row(int y) const { return along + static_cast<ptrdiff_t>(y) * pitch; }
  const T* down_row(int y) const { return down + static_cast<ptrdiff_t>(y) * pitch; }
  int column_tiles() const { return pitch / kLanes<T>; }
};

// Queries (y0 + v, x0 + lane) of `rows` vectors, the last lanes of which may lie beyond the map.
template <class T>
struct Block {
  int y0, rows, x0, lanes, width;
  IntVec<T> columns;

  Block(const Map<T>& map, int y0, int rows, int column_tile)
      : y0(y0),
        rows(rows),
        x0(column_tile * kLanes<T>),
        lanes(imin(kLanes<T>, map.width - x0)),
        width(rows * kLanes<T>),
        columns(positions_from<T>(x0)) {}

  // [channel][v][lane], zeros beyond the map
  template <class E>
  void read(const View& view, int64_t batch, int head, int channels, T factor, T* to) const {
    for (int v = 0; v < rows; ++v)
      pack(to + v * kLanes<T>, width, token<const E>(view, batch, head, y0 + v, x0), view.stride[4],
           view.stride[2], channels, lanes, factor);
  }
  // The same as [v][lane][channel].
  template <class E>
  void read_tokens(const View& view, int64_t batch, int head, int channels, T factor, T* to) const {
    const int pitch = round_up_lanes<T>(channels);
    for (int v = 0; v < rows; ++v, to += kLanes<T> * pitch) {
      pack(to, pitch, token<const E>(view, batch, head, y0 + v, x0), view.stride[2], view.stride[4], lanes,
           channels, factor);
      for (int i = lanes * pitch; i < kLanes<T> * pitch; ++i) to[i] = 0;
    }
  }
  // One number a query, from a plane [y][x] whose rows are `pitch` apart; zeros beyond the map.
  Vec<T> read_numbers(const T* plane, int pitch, int v) const {
    return load_first(plane + static_cast<ptrdiff_t>(y0 + v) * pitch + x0, lanes);
  }

  // The logarithms of the two masks' ways: along the query's row, down the key's column ...
  Vec<T> log_near(const Map<T>& map, int v, int l) const {
    const T* row = map.along_row(y0 + v);
    return between<T>(load(row + x0), row[l], columns, l);
  }
  T log_drop(const Map<T>& map, int v, int r, int l) const {
    const T rise = map.down_row(y0 + v)[l] - map.down_row(r)[l];
    return y0 + v >= r ? rise : -rise;
  }
  // ... and along the key's row, down the query's column.
  Vec<T> log_far(const Map<T>& map, int r, int l) const {
    const T* row = map.along_row(r);
    return between<T>(load(row + x0), row[l], columns, l);
  }
  Vec<T> log_fall(const Map<T>& map, int v, int r) const {
    const Vec<T> rise = load(map.down_row(y0 + v) + x0) - load(map.down_row(r) + x0);
    return y0 + v >= r ? rise : -rise;
  }
};

// The factors that a block needs for the rows [r0, r1) of keys.
template <class T>
struct Factors {
  T* near;  // [v][l][lane]: e^log_near
  T* drop;  // [v][r - r0][l]: e^log_drop, rows a pitch apart
  T* far;   // [r - r0][l][lane]: e^log_far, the same for all blocks in a tile of columns
  int first;

  Factors(const Params& p, int key_rows, Scratch& scratch) : first(0) {
    const int pitch = round_up_lanes<T>(p.width);
    near = scratch.take<T>(static_cast<size_t>(kBlockRows) * p.width * kLanes<T>);
    drop = scratch.take<T>(static_cast<size_t>(kBlockRows) * key_rows * pitch);
    far = scratch.take<T>(static_cast<size_t>(key_rows) * p.width * kLanes<T>);
  }
  void fill_far(const Map<T>& map, const Block<T>& block, int r0, int r1) {
    first = r0;
    T* to = far;
    for (int r = r0; r < r1; ++r)
      for (int l = 0; l < map.width; ++l, to += kLanes<T>)
        store(to, exp_softmax<T>(block.log_far(map, r, l)));
  }
  void fill_block(const Map<T>& map, const Block<T>& block, int r0, int r1) const {
    T* to = near;
    for (int v = 0; v < block.rows; ++v)
      for (int l = 0; l < map.width; ++l, to += kLanes<T>)
        store(to, exp_softmax<T>(block.log_near(map, v, l)));
    to = drop;
    for (int v = 0; v < block.rows; ++v) {
      const int y = block.y0 + v;
      for (int r = r0; r < r1; ++r, to += map.pitch) {
        const T *later = map.down_row(y >= r ? y : r), *earlier = map.down_row(y >= r ? r : y);
        for (int l = 0; l < map.pitch; l += kLanes<T>)
          store(to + l, exp_softmax<T>(load(later + l) - load(earlier + l)));
      }
    }
  }
  const T* near_row(const Map<T>& map, int v) const {
    return near + static_cast<ptrdiff_t>(v) * map.width * kLanes<T>;
  }
  const T* drop_row(const Map<T>& map, int v, int r, int r0, int r1) const {
    return drop + (static_cast<ptrdiff_t>(v) * (r1 - r0) + (r - r0)) * map.pitch;
  }
  const T* far_row(const Map<T>& map, int r) const {
    return far + static_cast<ptrdiff_t>(r - first) * map.width * kLanes<T>;
  }
};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention
