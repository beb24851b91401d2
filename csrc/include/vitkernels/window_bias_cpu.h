// The bias table of a window on the CPU: expanded to a tile of logits, and its gradient collected from one.
// Compiled once per instruction set.
#pragma once
#include "vitkernels/matrix_cpu.h"
#include "vitkernels/params.h"

namespace vitkernels::VITKERNELS_ISA {

// The bias table of one head, mirrored so that for a row token (yr, xr) and a row yl of lane tokens the
// Ww entries wanted are contiguous: at row yl - yr + Wh - 1, from column Ww - 1 - xr. In the forward pass
// rows are keys and lanes queries, so an entry's offset is (query - key); in the backward pass the roles,
// and with them the signs, are exchanged.
template <class T>
struct WindowBias {
  int wh, ww, pitch;
  bool is_signed, rows_are_queries;
  T* mirrored;

  WindowBias(int window_h, int window_w, bool is_signed, bool rows_are_queries, Scratch& scratch)
      : wh(window_h),
        ww(window_w),
        // Whole vectors are loaded and stored from any column.
        pitch(2 * ww - 1 + kLanes<T>),
        is_signed(is_signed),
        rows_are_queries(rows_are_queries),
        mirrored(scratch.take<T>(static_cast<size_t>(2 * wh - 1) * pitch)) {}

  // Entry of the table behind mirrored[y][x].
  int entry(int y, int x) const {
    if (is_signed) {
      const int at = y * (2 * ww - 1) + x;
      return rows_are_queries ? (2 * wh - 1) * (2 * ww - 1) - 1 - at : at;
    }
    const int dy = y - (wh - 1), dx = x - (ww - 1);
    return (dy < 0 ? -dy : dy) * ww + (dx < 0 ? -dx : dx);
  }

  template <class B>
  void read_as(const View& table, int64_t head) {
    const B* source = static_cast<const B*>(table.data) + head * table.stride[0];
    for (int y = 0; y < 2 * wh - 1; ++y) {
      T* row = mirrored + static_cast<ptrdiff_t>(y) * pitch;
      for (int x = 0; x < 2 * ww - 1; ++x)
        row[x] = static_cast<T>(load_one(source + entry(y, x) * table.stride[1]));
      for (int x = 2 * ww - 1; x < pitch; ++x) row[x] = 0;
    }
  }
  // table: [heads, entries]
  void read(DType dtype, const View& table, int64_t head) {
    with_dtype(dtype, [&](auto element) { read_as<decltype(element)>(table, head); });
  }

  void clear() {
    for (int i = 0; i < (2 * wh - 1) * pitch; ++i) mirrored[i] = 0;
  }
  // table[entry] = sum of the mirrored cells that stand for it, in row-major order.
  void fold(T* to, int entries) const {
    for (int i = 0; i < entries; ++i) to[i] = 0;
    for (int y = 0; y < 2 * wh - 1; ++y)
      for (int x = 0; x < 2 * ww - 1; ++x) to[entry(y, x)] += mirrored[static_cast<ptrdiff_t>(y) * pitch + x];
  }

  // Calls visit(slice of mirrored, lane, count) for the lanes [start, start + lanes) of row token `row`.
  template <class Visit>
  __attribute__((always_inline)) void slices(int row, int start, int lanes, Visit visit) const {
    const int yr = row / ww, xr = row % ww;
    for (int y = start / ww, lane = y * ww - start; lane < lanes; ++y, lane += ww) {
      T* slice = mirrored + static_cast<ptrdiff_t>(y - yr + wh - 1) * pitch + (ww - 1 - xr);
      const int skip = lane < 0 ? -lane : 0;
      visit(slice + skip, lane + skip, imin(ww, lanes - lane) - skip);
    }
  }

  // dst[row][lane] for all row tokens and the lane tokens [start, start + lanes). Stores whole vectors: a
  // slice's overhang is overwritten by the next one, the last row's goes to kLanes elements of slack.
  void expand(T* dst, int rows, int start, int lanes, int width) const {
    for (int r = 0; r < rows; ++r, dst += width)
      slices(r, start, lanes, [dst](const T* slice, int lane, int count) {
        for (int i = 0; i < count; i += kLanes<T>) store(dst + lane + i, load(slice + i));
      });
  }

  // The transpose of expand: mirrored += src. Slices overlap, so their rows are added one at a time: rows of
  // equal column first, whose slices coincide, since a load that overlaps a recent store waits for it.
  void collect(const T* src, int rows, int start, int lanes, int width) {
    for (int x = 0; x < ww; ++x)
      for (int r = x; r < rows; r += ww) {
        const T* row = src + static_cast<ptrdiff_t>(r) * width;
        slices(r, start, lanes, [row](T* slice, int lane, int count) {
          for (int i = 0; i < count; i += kLanes<T>)
            store(slice + i, load(slice + i) + load_first(row + lane + i, imin(kLanes<T>, count - i)));
        });
      }
  }
};

}  // namespace vitkernels::VITKERNELS_ISA
