// Depthwise convolution inside a window, tokens of a row in the lanes.
//
// A window's rows are copied into an image with zeros left and right of them; rows above and below are
// skipped instead. A column of taps, the sums of a column of outputs and one input fit in 16 registers, so
// that every load meets as many multiplications as there are taps in a column.
#pragma once
#include "cascaded_group_attention.h"
#include "vitkernels/matrix_cpu.h"

namespace vitkernels::cascaded_group_attention {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

template <class T>
struct Depthwise {
  int wh, ww, channels, border, pitch;
  T* images;  // [channels][wh][pitch], a row from column `border` on

  Depthwise(const Params& p, int channels, Scratch& scratch)
      : wh(p.window_h),
        ww(p.window_w),
        channels(channels),
        border((p.kernel_max / 2 + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        // Rows are whole vectors; the last one is loaded from every tap's shift.
        pitch(border + last_vector() + 2 * kLanes<T> + border),
        images(scratch.take<T>(image() * channels)) {}

  ptrdiff_t image() const { return static_cast<ptrdiff_t>(wh) * pitch; }

  // Before the first fill: what lies around the rows stays zero.
  void clear() const {
    for (ptrdiff_t i = 0; i < image() * channels; ++i) images[i] = 0;
  }

  // Rows [channel][token] into images. All channels before the first convolution: a load that spans two
  // recent stores would wait for both.
  void fill(const T* from, ptrdiff_t row, int count) const {
    constexpr int L = kLanes<T>;
    const int last = last_vector();
    Vec<T> live = {};
    for (int i = 0; i < L; ++i) live[i] = last + i < ww ? T(1) : T(0);
    const IntVec<T> inside = live > T(0);
    for (int c = 0; c < count; ++c)
      for (int y = 0; y < wh; ++y) {
        const T* src = from + c * row + static_cast<ptrdiff_t>(y) * ww;
        T* to = images + c * image() + static_cast<ptrdiff_t>(y) * pitch + border;
        for (int i = 0; i < last; i += L) store(to + i, load(src + i));
        store(to + last, inside ? load(src + last) : Vec<T>{});
      }
  }

  // sums[dy][dx][lanes] += this window's share of the gradient of the taps; `gradient` has images of the
  // output's gradient.
  void correlate(const Depthwise& gradient, int channel, int size, T* sums) const {
    const T *image = images + channel * this->image(), *g = gradient.images + channel * this->image();
    const int pad = size / 2, shift = border - pad;
    for (int dy = 0; dy < size; ++dy) {
      const int first = dy < pad ? pad - dy : 0, last = dy > pad ? wh - (dy - pad) : wh;
      for (int dx = 0; dx < size; ++dx, sums += kLanes<T>) {
        Vec<T> sum = load(sums);
        for (int y = first; y < last; ++y)
          for (int i = 0; i < ww; i += kLanes<T>)
            sum += load(g + static_cast<ptrdiff_t>(y) * pitch + border + i) *
                   load(image + static_cast<ptrdiff_t>(y + dy - pad) * pitch + shift + i + dx);
        store(sums, sum);
      }
    }
  }

  // to[token] = factor * (start + sum of taps); taps [size][taps_row]. Stores whole vectors, a row's last
  // vector first: the next row's other stores overwrite its overhang, and the last row's goes where `to` has
  // a vector of slack or is written later.
  void convolve(int channel, int size, const T* taps, ptrdiff_t taps_row, T start, T factor, T* to) const {
    const T* image = images + channel * this->image() + border - size / 2;
    if (wh == 7 && size == 3) return columns<7, 3>(image, taps, taps_row, start, factor, to);
    if (wh == 7 && size == 5) return columns<7, 5>(image, taps, taps_row, start, factor, to);
    if (wh == 7 && size == 7) return columns<7, 7>(image, taps, taps_row, start, factor, to);
    if (wh == 4 && size == 3) return columns<4, 3>(image, taps, taps_row, start, factor, to);
    if (wh == 4 && size == 5) return columns<4, 5>(image, taps, taps_row, start, factor, to);
    if (wh == 4 && size == 7) return columns<4, 7>(image, taps, taps_row, start, factor, to);
    for (int y = 0; y < wh; ++y)
      for (int i = last_vector(); i >= 0; i -= kLanes<T>) {
        Vec<T> sum = broadcast(start);
        for (int dx = 0; dx < size; ++dx)
          for (int dy = 0; dy < size; ++dy) {
            const int from = y + dy - size / 2;
            if (from < 0 || from >= wh) continue;
            sum += load(image + static_cast<ptrdiff_t>(from) * pitch + i + dx) * taps[dy * taps_row + dx];
          }
        store(to + static_cast<ptrdiff_t>(y) * ww + i, sum * factor);
      }
  }

 private:
  int last_vector() const { return (ww - 1) / kLanes<T> * kLanes<T>; }

  template <int Rows, int Size>
  void columns(const T* image, const T* taps, ptrdiff_t taps_row, T start, T factor, T* to) const {
    for (int i = last_vector(); i >= 0; i -= kLanes<T>) {
      Vec<T> sum[Rows];
#pragma GCC unroll 8
      for (int y = 0; y < Rows; ++y) sum[y] = broadcast(start);
      for (int dx = 0; dx < Size; ++dx) {
        Vec<T> tap[Size];
#pragma GCC unroll 8
        for (int dy = 0; dy < Size; ++dy) tap[dy] = broadcast(taps[dy * taps_row + dx]);
#pragma GCC unroll 8
        for (int from = 0; from < Rows; ++from) {
          const Vec<T> x = load(image + from * pitch + i + dx);
#pragma GCC unroll 8
          for (int dy = 0; dy < Size; ++dy) {
            const int y = from - dy + Size / 2;
            if (y >= 0 && y < Rows) sum[y] += x * tap[dy];
          }
        }
      }
#pragma GCC unroll 8
      for (int y = 0; y < Rows; ++y) store(to + static_cast<ptrdiff_t>(y) * ww + i, sum[y] * factor);
    }
  }
};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::cascaded_group_attention
