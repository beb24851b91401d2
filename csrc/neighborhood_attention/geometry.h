// The tokens of a map in tiles: which queries a tile holds, which keys it meets, which queries meet a tile
// of keys. All in group coordinates: dilation splits each axis into groups that never meet, and inside a
// group it does not exist.
#pragma once
#include "neighborhood_attention.h"
#include "vitkernels/divide.h"
#include "vitkernels/tile_attention.h"

namespace vitkernels::neighborhood_attention {

inline int bit_length(int value) {
  int count = 0;
  while (value >> count > 0) ++count;
  return count;
}

using tile_attention::Span;

VK_HOST_DEVICE Span common(Span a, Span b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// One side of the map. Token i is number i / dilation of group i % dilation; the first long_groups of the
// groups have one token more than the others.
struct Axis {
  int kernel = 1;
  int left = 0;    // of a window's keys, how many come before the query when no border is near
  int lowest = 0;  // where a window may begin: windows that end at their query may hang over the border
  bool causal = false;
  Divisor dilation;
  int short_length = 1;
  int long_groups = 0;

  Axis() = default;
  Axis(int size, int kernel, int dilation, bool causal)
      : kernel(kernel),
        left(causal ? kernel - 1 : kernel / 2),
        lowest(causal ? 1 - kernel : 0),
        causal(causal),
        dilation(dilation),
        short_length(size / dilation),
        long_groups(size % dilation) {}

  int longest() const { return short_length + (long_groups > 0); }
  VK_HOST_DEVICE int length(int group) const { return short_length + (group < long_groups); }

  // A window is the `kernel` numbers from here on; those below 0 (causal only) have no key.
  VK_HOST_DEVICE int window(int number, int length) const {
    const int at_most = length - kernel, begin = number - left;
    const int below = begin < at_most ? begin : at_most;
    return below > lowest ? below : lowest;
  }
  VK_HOST_DEVICE Span keys_of(Span queries, int length) const {
    const int begin = window(queries.begin, length);
    return {begin > 0 ? begin : 0, window(queries.end - 1, length) + kernel};
  }
  VK_HOST_DEVICE Span queries_of(Span keys, int length) const {
    const int first = keys.begin, last = keys.end - 1;
    const int begin = first - (kernel - 1) + left, end = last + left + 1;
    const bool to_start = !causal && first < kernel, to_end = !causal && last >= length - kernel;
    return {to_start ? 0 : begin, to_end || end > length ? length : end};
  }
};

// A group is cut into tiles of `height` x `width` tokens, their slots row by row; slots beyond are empty.
struct Tiling {
  int height = 1;
  Divisor width;
  Divisor tiles_y, tiles_x;  // of the longest group; in others the last may be empty

  VK_HOST_DEVICE int per_group() const { return tiles_y.value() * tiles_x.value(); }
};

// The work of a group cut into tiles_y x tiles_x tiles of size h x w, in about the time that a warp takes for
// its 16 queries and 8 keys. Loading tiles of keys and of queries costs, too.
inline int64_t tiling_cost(int rows, const Axis& y, const Axis& x, int tiles_y, int h, int tiles_x, int w) {
  // The first tile, those between, and the last differ in their distance to the border.
  struct Extents {
    int count[3], keys[3];
    Extents(const Axis& axis, int tiles, int size) {
      const int n = axis.longest(), tile[3] = {0, 1, tiles - 1}, times[3] = {1, tiles - 2, tiles > 1};
      for (int i = 0; i < 3; ++i) {
        count[i] = times[i] > 0 ? times[i] : 0;
        const int begin = tile[i] * size, end = begin + size < n ? begin + size : n;
        keys[i] = count[i] > 0 ? axis.keys_of({begin, end}, n).length() : 0;
      }
    }
  };
  const Extents of_y(y, tiles_y, h), of_x(x, tiles_x, w);
  const int strip = (15 + w - 1) / w + (16 % w != 0);  // rows of a tile that 16 queries lie in
  int64_t cost = 0;
  for (int i = 0; i < 3; ++i) {
    const int strip_keys = strip + y.kernel - 1 < of_y.keys[i] ? strip + y.kernel - 1 : of_y.keys[i];
    for (int j = 0; j < 3; ++j) {
      const int64_t key_tiles = (static_cast<int64_t>(of_y.keys[i]) * of_x.keys[j] + rows - 1) / rows;
      const int64_t blocks = (static_cast<int64_t>(strip_keys) * of_x.keys[j] + 7) / 8;
      cost += static_cast<int64_t>(of_y.count[i]) * of_x.count[j] * (4 + 4 * key_tiles + blocks);
    }
  }
  return cost;
}

// The shape of tiles with up to `rows` tokens that makes the least work. Equal tiles, so that none is nearly
// empty.
inline Tiling choose_tiling(int rows, const Axis& y, const Axis& x) {
  Tiling best;
  int64_t least = -1;
  const auto ceil_divide = [](int a, int b) { return (a + b - 1) / b; };
  for (int h = 1; h <= rows && h <= y.longest(); ++h) {
    const int widest = rows / h < x.longest() ? rows / h : x.longest();
    const int tiles_y = ceil_divide(y.longest(), h), tiles_x = ceil_divide(x.longest(), widest);
    const int height = ceil_divide(y.longest(), tiles_y), width = ceil_divide(x.longest(), tiles_x);
    const int64_t cost = tiling_cost(rows, y, x, tiles_y, height, tiles_x, width);
    if (least >= 0 && cost >= least) continue;
    least = cost;
    best.height = height;
    best.width = Divisor(width);
    best.tiles_y = Divisor(tiles_y);
    best.tiles_x = Divisor(tiles_x);
  }
  return best;
}

// The keys (queries) that a tile of queries (keys) meets: a rectangle of its group.
struct Box {
  Span y, x;
  VK_HOST_DEVICE int count() const { return y.length() * x.length(); }
  VK_HOST_DEVICE bool empty() const { return y.length() <= 0 || x.length() <= 0; }
};

// The tokens of a box, counted row by row: what the kernels keep in registers is these four numbers.
struct Numbering {
  int first;    // token
  int per_row;  // what a step to the next row adds beyond one token for each column
  int count;
  Reciprocal width;

  VK_DEVICE int token(int number, int per_column) const {
    return number < count ? first + width.divide(number) * per_row + number * per_column : -1;
  }
};

}  // namespace vitkernels::neighborhood_attention
