// Window attention as a map of the tile-attention core: every query of a window meets every key of it, and a
// bias looked up by the offset between the two is added to the logit.
#pragma once
#include "vitkernels/divide.h"
#include "vitkernels/tile_attention_forward.h"
#include "vitkernels/tile_attention_table.h"
#include "window_attention.h"

namespace vitkernels::window_attention {

// In shared memory the table is always the signed one, [2 Wh - 1][2 Ww - 1], whatever its layout in global
// memory. With code(y, x) = y (2 Ww - 1) + x a pair's entry is code(query) - code(key), a query's code being
// raised by the entry of offset zero: one subtraction.
template <class T>
struct WindowMap {
  using Acc = accumulate_t<T>;

  int window_h = 1;
  int window_w = 1;
  bool signed_bias = false;
  bool wide_table = false;  // the table is of type Acc rather than T
  View bias_table;          // absent: no bias
  Divisor by_width, by_pitch;

  explicit WindowMap(const Params& params)
      : window_h(params.window_h),
        window_w(params.window_w),
        signed_bias(params.signed_bias),
        wide_table(params.bias_dtype != params.dtype),
        bias_table(params.bias_table),
        by_width(window_w),
        by_pitch(pitch()) {}

  VK_HOST_DEVICE int tokens() const { return window_h * window_w; }
  VK_HOST_DEVICE bool fits_small_tile() const { return tokens() <= 16; }

  VK_HOST_DEVICE int query_tiles(int rows) const { return (tokens() + rows - 1) / rows; }
  VK_HOST_DEVICE int key_tiles(int rows) const { return query_tiles(rows); }
  VK_DEVICE int key_tiles_of(int rows, int) const { return key_tiles(rows); }
  VK_DEVICE int query_tiles_of(int rows, int) const { return query_tiles(rows); }
  VK_DEVICE tile_attention::Run query_run(int rows, int tile) const {
    return tile_attention::Run::of(tokens(), rows, tile);
  }
  VK_DEVICE tile_attention::Run key_run(int rows, int, int i) const { return query_run(rows, i); }
  VK_HOST_DEVICE int query_count() const { return tokens(); }
  VK_DEVICE int query(int rows, int tile, int slot) const {
    if constexpr (sizeof(T) == 2) return query_run(rows, tile).token(slot);
    // What a Run holds is more than the registers of doubles do.
    const int token = tile * rows + slot;
    return token < tokens() ? token : -1;
  }
  VK_DEVICE int key(int rows, int tile, int slot) const { return query(rows, tile, slot); }
  VK_DEVICE int key_of(int rows, int, int i, int slot) const { return query(rows, i, slot); }
  VK_DEVICE int query_of(int rows, int, int i, int slot) const { return query(rows, i, slot); }

  VK_HOST_DEVICE int pitch() const { return 2 * window_w - 1; }
  VK_HOST_DEVICE int signed_entries() const { return (2 * window_h - 1) * pitch(); }
  VK_DEVICE int key_code(int token) const { return token + by_width.divide(token) * (window_w - 1); }
  VK_DEVICE int query_code(int token) const {
    return key_code(token) + (window_h - 1) * pitch() + window_w - 1;
  }
  using KeyCode = int;
  VK_DEVICE static int no_key() { return tile_attention::INVALID; }
  using Query = int;
  VK_DEVICE Query of_query(int query_code) const { return query_code; }
  VK_DEVICE Acc logit(Acc s, int query_code, int key_code, const Acc* table) const {
    if (key_code == no_key()) return -INFINITY;
    return tile_attention::present(bias_table) ? s + table[query_code - key_code] : s;
  }

  VK_HOST_DEVICE int shared_elements() const {
    return tile_attention::present(bias_table) ? signed_entries() : 0;
  }
  VK_DEVICE void stage(Acc* table, int64_t head, int thread, int threads) const {
    if (!tile_attention::present(bias_table)) return;
    VK_NO_UNROLL
    for (int e = thread; e < signed_entries(); e += threads)
      table[e] = tile_attention::read_table<T>(*this, bias_table, head, table_entry(e));
  }
  struct Offset {
    int dy, dx;
  };
  VK_HOST_DEVICE Offset offset_of(int e) const {  // of query to key, of signed entry e
    const int row = by_pitch.divide(e);
    return {row - (window_h - 1), e - row * pitch() - (window_w - 1)};
  }
  // The global table's entry that signed entry e reads, and the signed entries that read an entry: up to
  // four, one for (|dy|, |dx|) being mirrored.
  static constexpr int SOURCES = 4;
  VK_HOST_DEVICE int table_entry(int e) const {
    if (signed_bias) return e;
    const auto [dy, dx] = offset_of(e);
    return (dy < 0 ? -dy : dy) * window_w + (dx < 0 ? -dx : dx);
  }
  VK_DEVICE int source(int entry, int i) const {
    if (signed_bias) return i == 0 ? entry : -1;
    const int dy = entry / window_w, dx = entry % window_w;
    if ((i / 2 == 1 && dy == 0) || (i % 2 == 1 && dx == 0)) return -1;
    const int center = (window_h - 1) * pitch() + window_w - 1;
    return center + (i / 2 == 1 ? -dy : dy) * pitch() + (i % 2 == 1 ? -dx : dx);
  }
  VK_HOST_DEVICE int table_entries() const { return signed_bias ? signed_entries() : tokens(); }
  VK_HOST_DEVICE int64_t table_offset(const View& table, int entry) const { return entry * table.stride[1]; }

  // sums[e] += the tile's gradients at signed entry e, queries in ascending order: each entry has one thread.
  VK_HOST_DEVICE int gradient_elements() const { return signed_entries(); }
  VK_DEVICE void gradient(Acc* sums, const tile_attention::GradientTile<Acc, KeyCode>& tile) const {
    const int first_query = tile.query_tile * tile.rows, first_key = tile.key_tile * tile.rows;
    VK_NO_UNROLL
    for (int e = tile.thread; e < signed_entries(); e += tile.threads) {
      const auto [dy, dx] = offset_of(e);
      // The queries with a key at this offset lie in these rows of the window; which of them have one in this
      // tile, and none beyond the window's sides, shows in the codes.
      int begin = (dy > 0 ? dy : 0) * window_w - first_query;
      int end = (window_h + (dy < 0 ? dy : 0)) * window_w - first_query;
      const int shift = first_query - dy * window_w - dx - first_key;  // key slot minus query slot
      if (begin < 0) begin = 0;
      if (begin < -shift) begin = -shift;
      if (end > tile.rows) end = tile.rows;
      if (end > tile.rows - shift) end = tile.rows - shift;
      Acc sum = sums[e];
      for (int row = begin; row < end; ++row) {
        if (tile.query_codes[row] - e == tile.key_codes[row + shift])
          sum += tile.values[row * tile.ld + row + shift];
      }
      sums[e] = sum;
    }
  }
};

inline tile_attention::Problem make_problem(const Params& params) {
  return tile_attention::make_problem(params, "window attention");
}

}  // namespace vitkernels::window_attention
