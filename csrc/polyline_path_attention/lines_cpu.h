// Rows and columns of a map, the lines in which criss-cross attention works. Compiled once per instruction
// set.
#pragma once
#include "maps_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {

// Rows, then columns, then rows again.
VITKERNELS_INLINE bool is_vertical(int sweep) {
  return sweep == 1;
}
VITKERNELS_INLINE int line_length(const Params& p, int sweep) {
  return is_vertical(sweep) ? p.height : p.width;
}
VITKERNELS_INLINE int lines_of_map(const Params& p, int sweep) {
  return is_vertical(sweep) ? p.width : p.height;
}
// Channels of two tensors side by side, the second after the last of the first.
template <class T>
VITKERNELS_INLINE int pair_pitch(const Params& p) {
  return round_up_lanes<T>(p.value_dim + round_up_lanes<T>(p.value_dim));
}

// One row or column of one head.
struct Line {
  int64_t batch;
  int head, index, length;
  bool vertical;

  Line(const Params& p, int64_t item, int sweep)
      : length(line_length(p, sweep)), vertical(is_vertical(sweep)) {
    // Heads change fastest: they lie side by side.
    const int lines = lines_of_map(p, sweep);
    head = static_cast<int>(item % p.heads);
    index = static_cast<int>(item / p.heads % lines);
    batch = item / p.heads / lines;
  }
  template <class E>
  E* first(const View& view) const {
    return vertical ? token<E>(view, batch, head, 0, index) : token<E>(view, batch, head, index, 0);
  }
  ptrdiff_t step(const View& view) const { return vertical ? view.stride[1] : view.stride[2]; }

  // [token][channel]
  template <class E, class T>
  void read(const View& view, int channels, T factor, T* to, int pitch) const {
    pack(to, pitch, first<const E>(view), step(view), view.stride[4], length, channels, factor);
  }
  // [channel][token] of the tokens from `begin` on
  template <class E, class T>
  void read_lanes(const View& view, int begin, int count, int channels, T factor, T* to, int width) const {
    pack(to, width, first<const E>(view) + begin * step(view), view.stride[4], step(view), channels, count,
         factor);
  }
  template <class E, class T>
  void write_lanes(const View& view, int begin, int count, int channels, const T* from, int width,
                   const T* factors) const {
    unpack(first<E>(view) + begin * step(view), view.stride[4], step(view), from, width, channels, count,
           factors);
  }

  // Its sums of decays, padded with the last one to `padded` elements.
  template <class T>
  void read_sums(const Params& p, T* to, int padded) const {
    const T* from = plane<const T>(p.cum, vertical, batch, head) +
                    (vertical ? index : static_cast<ptrdiff_t>(index) * p.width);
    const ptrdiff_t step = vertical ? p.width : 1;
    for (int i = 0; i < padded; ++i) to[i] = from[imin(i, length - 1) * step];
  }
  template <class T>
  T* lse(const Params& p) const {
    return plane<T>(p.lse, vertical, batch, head) +
           (vertical ? index : static_cast<ptrdiff_t>(index) * p.width);
  }
  ptrdiff_t lse_step(const Params& p) const { return vertical ? p.width : 1; }
};

// mask[row][lane]: what the decays between tokens row0 + row and lane0 + lane of the line add up to.
template <class T>
static void fill_mask(const T* sums, int row0, int rows, int lane0, int width, T* mask) {
  constexpr int L = kLanes<T>;
  for (int i = 0; i < width; i += L) {
    const int lane = lane0 + i;
    const Vec<T> at_lanes = load(sums + lane);
    const IntVec<T> lanes = positions_from<T>(lane);
    T* to = mask + i;
    int row = 0;
    for (; row < rows && row0 + row <= lane; ++row, to += width) store(to, at_lanes - sums[row0 + row]);
    for (; row < rows && row0 + row < lane + L; ++row, to += width)
      store(to, between<T>(at_lanes, sums[row0 + row], lanes, row0 + row));
    for (; row < rows; ++row, to += width) store(to, sums[row0 + row] - at_lanes);
  }
}

VITKERNELS_INLINE int64_t sweep_items(const Params& p, int sweep) {
  return p.batch * p.heads * lines_of_map(p, sweep);
}

// visit(element of the tensors' dtype)
template <class Visit>
VITKERNELS_INLINE auto by_dtype(const Params& p, Visit visit) {
  switch (p.dtype) {
    case DType::f64:
      return visit(double{});
    case DType::f32:
      return visit(float{});
    case DType::f16:
      return visit(f16{});
    default:
      return visit(bf16{});
  }
}

VITKERNELS_INLINE int64_t head_items(const Params& p) {
  return p.batch * p.heads;
}

// ---- one head gathered, so that all sweeps over it run in the second-level cache: in a tensor of many heads
// its tokens lie far apart, a cache line or two each, and every sweep would fetch them anew

// A tensor [y][x][channel] in scratch, as that of one map and one head.
template <class E>
static View gathered(const Params& p, int channels, Scratch* scratch) {
  View view;
  view.data = scratch->take<E>(static_cast<size_t>(p.height) * p.width * channels);
  view.stride[0] = view.stride[3] = 0;
  view.stride[1] = static_cast<ptrdiff_t>(p.width) * channels;
  view.stride[2] = channels;
  view.stride[4] = 1;
  return view;
}

template <class E>
static void copy_head(const Params& p, const View& from, int64_t from_map, int from_head, const View& to,
                      int64_t to_map, int to_head, int channels) {
  for (int y = 0; y < p.height; ++y)
    for (int x = 0; x < p.width; ++x)
      __builtin_memcpy(token<E>(to, to_map, to_head, y, x), token<const E>(from, from_map, from_head, y, x),
                       channels * sizeof(E));
}

template <class E>
static void move_to(View* view, int64_t map, int head) {
  if (*view) view->data = token<E>(*view, map, head, 0, 0);
}

// The problem of one head of one map, its tensors where they are.
template <class E>
static Params head_of(const Params& p, int64_t map, int head) {
  using T = Compute<E>;
  Params one = p;
  one.batch = 1;
  one.heads = 1;
  View* const gradients[] = {&one.grad_q, &one.grad_k, &one.grad_v};
  for (View* view : gradients) move_to<E>(view, map, head);
  by_decay<E>(p, [&](auto d) {
    using D = decltype(d);
    move_to<D>(&one.grad_log_decay_w, map, head);
    move_to<D>(&one.grad_log_decay_h, map, head);
  });
  if (p.lse) one.lse.data = plane<T>(p.lse, 0, map, head);
  one.cum.data = plane<T>(p.cum, 0, map, head);
  return one;
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention
