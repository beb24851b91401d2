// Products of neighborhood attention with queries in the vector lanes. Compiled once per instruction set.
//
// The lanes hold neighbouring queries of one row of a group, and a key is known by its shift: its column less
// the query's. Keys lie with their columns side by side, so the keys of all lanes at one shift are one
// vector, loaded from wherever it starts. A row of keys meets all query rows of a tile that see it, which
// share the loads. Where the window is clamped at a border the shifts differ between lanes: the tile then
// takes the union of them and a mask. Inside a map no product is wasted.
#pragma once
#include "groups_cpu.h"

namespace vitkernels::neighborhood_attention {
namespace VITKERNELS_ISA {

constexpr int kRows = 7;       // most query rows of a tile
constexpr int kBlockRows = 4;  // most of them in registers together

// What fits in the register file beside the operands.
constexpr int max_shifts(int rows) {
  constexpr int few[] = {0, 8, 6, 4, 3}, many[] = {0, 8, 8, 8, 6};
  return kVectorRegisters == 32 ? many[rows] : few[rows];
}
constexpr int max_channels(int rows) {
  constexpr int few[] = {0, 8, 4, 3, 3}, many[] = {0, 8, 8, 6, 6};
  return kVectorRegisters == 32 ? many[rows] : few[rows];
}

// Rows of keys or values, [row][channel][left | columns | right], the margins being zeros; a ring of as many
// rows as the tiles of queries need at a time.
template <class T>
struct Ring {
  int slots, channels;
  ptrdiff_t left, columns, pitch;
  T* data;

  Ring(const Params& p, int slots, int channels, Scratch& scratch) : slots(slots), channels(channels) {
    left = round_up_lanes<T>(p.kernel_w - 1);
    columns = round_up_lanes<T>(longest(p.width, p.dilation_w));
    pitch = left + columns + round_up_lanes<T>(p.kernel_w - 1);
    data = scratch.take<T>(size());
  }
  size_t size() const { return static_cast<size_t>(slots) * channels * pitch; }
  T* row(int y) const { return data + static_cast<ptrdiff_t>(y % slots) * channels * pitch + left; }

  void clear() const {
    for (size_t i = 0, n = size(); i < n; ++i) data[i] = 0;
  }
  template <class E>
  void read(const Group& g, const View& view, int y) const {
    T* to = row(y);
    g.prefetch<E>(view, y + 1, 0, g.x.size, channels);
    pack(to, static_cast<int>(pitch), g.token<const E>(view, y, 0), view.stride[4], g.stride(view), channels,
         g.x.size, T(1));
    // A longer group may have left its last column here.
    for (int x = round_up_lanes<T>(g.x.size); x < columns; ++x)
      for (int c = 0; c < channels; ++c) to[c * pitch + x] = 0;
  }
  template <class E>
  void write(const Group& g, const View& view, int y, const T* ones) const {
    unpack(g.token<E>(view, y, 0), view.stride[4], g.stride(view), row(y), static_cast<int>(pitch), channels,
           g.x.size, ones);
  }
  void clear_row(int y) const {
    T* to = row(y) - left;
    for (ptrdiff_t i = 0; i < channels * pitch; ++i) to[i] = 0;
  }
};

// s[r][shift] = sum over channels of a[r][channel] * b[channel][shift]
template <class T, int R, int J>
static __attribute__((noinline)) void correlate_block(const T* a, ptrdiff_t a_row, const T* b,
                                                      ptrdiff_t pitch, int channels, T* const* s, int shift) {
  constexpr int L = kLanes<T>;
  b += shift;
  for (int runs = ceil_div(channels, kRun), done = 0; runs > 0; --runs) {
    Vec<T> acc[R][J];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) acc[r][j] = Vec<T>{};
    const int run = ceil_div(channels - done, runs);
    for (int c = run; c > 0; --c, a += L, b += pitch) {
      Vec<T> bv[J];
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) bv[j] = load(b + j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> av = load(a + r * a_row);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) acc[r][j] += av * bv[j];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        T* to = s[r] + (shift + j) * L;
        store(to, done ? load(to) + acc[r][j] : acc[r][j]);
      }
    done += run;
  }
}

template <class T, int R, int J>
VITKERNELS_INLINE void correlate_shifts(int count, const T* a, ptrdiff_t a_row, const T* b, ptrdiff_t pitch,
                                        int channels, T* const* s, int shift) {
  if (count == J)
    correlate_block<T, R, J>(a, a_row, b, pitch, channels, s, shift);
  else if constexpr (J > 1)
    correlate_shifts<T, R, J - 1>(count, a, a_row, b, pitch, channels, s, shift);
}

template <class T, int R>
static void correlate_rows(const T* a, ptrdiff_t a_row, const T* b, ptrdiff_t pitch, int channels,
                           T* const* s, int shifts) {
  int shift = 0;
  for (int blocks = ceil_div(shifts, max_shifts(R)); blocks > 0; --blocks) {
    const int count = ceil_div(shifts - shift, blocks);
    correlate_shifts<T, R, max_shifts(R)>(count, a, a_row, b, pitch, channels, s, shift);
    shift += count;
  }
}

// out[r][channel] += sum over shifts of p[r][shift] * b[channel][shift]; of b only what the mask lets pass.
template <class T, int R, int C, bool Masked>
static __attribute__((noinline)) void accumulate_block(const T* const* p, const T* mask, const T* b,
                                                       ptrdiff_t pitch, int shifts, T* out,
                                                       ptrdiff_t out_row) {
  constexpr int L = kLanes<T>;
  for (int shift = 0; shift < shifts;) {
    Vec<T> acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = Vec<T>{};
    for (const int end = imin(shifts, shift + kRun); shift < end; ++shift) {
      Vec<T> bv[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        bv[c] = load(b + c * pitch + shift);
        if constexpr (Masked)
          bv[c] = bit_cast<Vec<T>>(bit_cast<IntVec<T>>(bv[c]) & bit_cast<IntVec<T>>(load(mask + shift * L)));
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> pv = load(p[r] + shift * L);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[r][c] += pv * bv[c];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        T* to = out + r * out_row + c * L;
        store(to, load(to) + acc[r][c]);
      }
  }
}

template <class T, int R, int C>
VITKERNELS_INLINE void accumulate_channels(int count, const T* const* p, const T* mask, const T* b,
                                           ptrdiff_t pitch, int shifts, T* out, ptrdiff_t out_row) {
  if (count == C)
    mask ? accumulate_block<T, R, C, true>(p, mask, b, pitch, shifts, out, out_row)
         : accumulate_block<T, R, C, false>(p, mask, b, pitch, shifts, out, out_row);
  else if constexpr (C > 1)
    accumulate_channels<T, R, C - 1>(count, p, mask, b, pitch, shifts, out, out_row);
}

template <class T, int R>
static void accumulate_rows(const T* const* p, const T* mask, const T* b, ptrdiff_t pitch, int channels,
                            int shifts, T* out, ptrdiff_t out_row) {
  int channel = 0;
  for (int blocks = ceil_div(channels, max_channels(R)); blocks > 0; --blocks) {
    const int count = ceil_div(channels - channel, blocks);
    accumulate_channels<T, R, max_channels(R)>(count, p, mask, b + channel * pitch, pitch, shifts,
                                               out + channel * kLanes<T>, out_row);
    channel += count;
  }
}

// to[channel][shift] += sum over r of p[r][shift] * a[r][channel], of lanes that the mask lets pass. Shifts
// are the outer loop: the vectors of neighbouring shifts overlap in memory, and a load must not catch up with
// the store before it.
template <class T, int R, bool Masked>
static __attribute__((noinline)) void scatter_block(const T* const* p, const T* mask, const T* a,
                                                    ptrdiff_t a_row, int channels, int shifts, T* to,
                                                    ptrdiff_t pitch) {
  constexpr int L = kLanes<T>;
  for (int shift = 0; shift < shifts; ++shift) {
    Vec<T> pv[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) pv[r] = load(p[r] + shift * L);
    const IntVec<T> pass = Masked ? bit_cast<IntVec<T>>(load(mask + shift * L)) : IntVec<T>{};
    const T* from = a;
    T* sum = to + shift;
    for (int c = channels; c > 0; --c, from += L, sum += pitch) {
      Vec<T> acc = pv[0] * load(from);
#pragma GCC unroll 8
      for (int r = 1; r < R; ++r) acc += pv[r] * load(from + r * a_row);
      if constexpr (Masked) acc = bit_cast<Vec<T>>(bit_cast<IntVec<T>>(acc) & pass);
      store(sum, load(sum) + acc);
    }
  }
}

template <class T, int R>
static void scatter_rows(int rows, const T* const* p, const T* mask, const T* a, ptrdiff_t a_row,
                         int channels, int shifts, T* to, ptrdiff_t pitch) {
  if (rows == R)
    mask ? scatter_block<T, R, true>(p, mask, a, a_row, channels, shifts, to, pitch)
         : scatter_block<T, R, false>(p, mask, a, a_row, channels, shifts, to, pitch);
  else if constexpr (R > 1)
    scatter_rows<T, R - 1>(rows, p, mask, a, a_row, channels, shifts, to, pitch);
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::neighborhood_attention
