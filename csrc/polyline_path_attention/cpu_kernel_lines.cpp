// Criss-cross polyline path attention, forward, on one core and one instruction set.
//
// Floor of a map of N tokens: 2 N (H + W) (d + 2 dv) FLOPs and N (H + W) exponentials; the rows'
// probabilities are computed twice, which adds 2 N W d and N W. Sweeps:
//   rows      A_w v
//   columns   A_h (A_w v) and A_h v, in one product
//   rows      A_w (A_h v), and the mean of both orders
#include "lines_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {
namespace {

template <class T>
struct ForwardScratch {
  Tiling<T> tiling;
  int d_pitch, v_pitch;
  T *sums, *k, *v, *q, *mask, *s, *out, *previous, *inverse, *lse, *ones;
  size_t size;

  ForwardScratch(const Params& p, int sweep, Scratch scratch)
      : tiling(line_length(p, sweep)), d_pitch(round_up_lanes<T>(p.head_dim)), v_pitch(pair_pitch<T>(p)) {
    const size_t n = tiling.tokens, width = tiling.width;
    sums = scratch.take<T>(tiling.count * width);
    k = scratch.take<T>(n * d_pitch);
    v = scratch.take<T>(n * v_pitch);
    q = scratch.take<T>(p.head_dim * width);
    mask = scratch.take<T>(n * width);
    s = scratch.take<T>(n * width);
    out = scratch.take<T>(2 * p.value_dim * width);
    previous = scratch.take<T>(p.value_dim * width);
    inverse = scratch.take<T>(width);
    lse = scratch.take<T>(width);
    ones = scratch.take<T>(width);
    size = scratch.used;
  }
};

template <class E, class T>
void forward_line(const Params& p, int sweep, const Line& line, const ForwardScratch<T>& w) {
  constexpr int L = kLanes<T>;
  const int n = line.length, width = w.tiling.width, dv = p.value_dim;
  const View by_rows = saved_product<E>(p, 0), by_columns = saved_product<E>(p, 1);
  line.read_sums(p, w.sums, w.tiling.count * width);
  line.template read<E>(p.k, p.head_dim, T(1), w.k, w.d_pitch);
  if (sweep == 1) line.template read<E>(by_rows, dv, T(1), w.v, w.v_pitch);
  line.template read<E>(sweep == 2 ? by_columns : p.v, dv, T(1), w.v + (sweep == 1 ? dv : 0), w.v_pitch);
  const int channels = sweep == 1 ? 2 * dv : dv;
  for (int tile = 0; tile < w.tiling.count; ++tile) {
    const int begin = w.tiling.start(tile), lanes = w.tiling.lanes(tile);
    line.template read_lanes<E>(p.q, begin, lanes, p.head_dim, static_cast<T>(p.scale), w.q, width);
    for (int c = 0; c < p.head_dim; ++c)
      for (int i = round_up_lanes<T>(lanes); i < width; ++i) w.q[static_cast<ptrdiff_t>(c) * width + i] = 0;
    fill_mask(w.sums, 0, n, begin, width, w.mask);
    ForwardTile<T>{n, width, 0, p.head_dim, channels, w.q, w.mask, w.s, w.out, w.inverse, w.lse, nullptr}.run(
        {w.k, w.d_pitch, 1}, {w.v, w.v_pitch, 1});
    if (p.lse && sweep < 2) {
      T* to = line.template lse<T>(p) + begin * line.lse_step(p);
      for (int i = 0; i < lanes; ++i) to[i * line.lse_step(p)] = w.lse[i];
    }
    if (sweep == 0) {
      line.template write_lanes<E>(by_rows, begin, lanes, dv, w.out, width, w.inverse);
    } else if (sweep == 1) {
      line.template write_lanes<E>(p.out, begin, lanes, dv, w.out, width, w.inverse);
      line.template write_lanes<E>(by_columns, begin, lanes, dv, w.out + static_cast<ptrdiff_t>(dv) * width,
                                   width, w.inverse);
    } else {
      line.template read_lanes<E>(p.out, begin, lanes, dv, T(0.5), w.previous, width);
      for (int c = 0; c < dv; ++c)
        for (int i = 0; i < round_up_lanes<T>(lanes); i += L) {
          T* at = w.out + static_cast<ptrdiff_t>(c) * width + i;
          store(at, load(w.previous + (at - w.out)) + load(at) * load(w.inverse + i) * T(0.5));
        }
      line.template write_lanes<E>(p.out, begin, lanes, dv, w.out, width, w.ones);
    }
  }
}

template <class E>
void forward_range(const Params& p, int sweep, int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  const ForwardScratch<T> w(p, sweep, Scratch(memory));
  for (int i = 0; i < w.tiling.width; ++i) w.ones[i] = 1;
  for (int64_t item = begin; item < end; ++item) forward_line<E>(p, sweep, Line(p, item, sweep), w);
}

template <class E>
struct HeadScratch {
  View q, k, v, out, products;
  char* sweeps;
  size_t size;

  HeadScratch(const Params& p, Scratch scratch) {
    q = gathered<E>(p, p.head_dim, &scratch);
    k = gathered<E>(p, p.head_dim, &scratch);
    v = gathered<E>(p, p.value_dim, &scratch);
    out = gathered<E>(p, p.value_dim, &scratch);
    const ptrdiff_t each = static_cast<ptrdiff_t>(p.height) * p.width * p.value_dim;
    products.data = scratch.take<E>(2 * each);
    products.stride[0] = each;
    sweeps = scratch.base + scratch.used;
    size = scratch.used;
    size_t largest = 0;
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      const size_t needed = ForwardScratch<Compute<E>>(p, sweep, Scratch(nullptr)).size;
      largest = needed > largest ? needed : largest;
    }
    size += largest;
  }
};

template <class E>
void forward_heads(const Params& p, int64_t begin, int64_t end, void* memory) {
  const HeadScratch<E> w(p, Scratch(memory));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t map = item / p.heads;
    const int head = static_cast<int>(item % p.heads);
    Params one = head_of<E>(p, map, head);
    one.q = w.q, one.k = w.k, one.v = w.v, one.out = w.out, one.partial = w.products;
    copy_head<E>(p, p.q, map, head, one.q, 0, 0, p.head_dim);
    copy_head<E>(p, p.k, map, head, one.k, 0, 0, p.head_dim);
    copy_head<E>(p, p.v, map, head, one.v, 0, 0, p.value_dim);
    for (int sweep = 0; sweep < kSweeps; ++sweep)
      forward_range<E>(one, sweep, 0, sweep_items(one, sweep), w.sweeps);
    copy_head<E>(p, one.out, 0, 0, p.out, map, head, p.value_dim);
    for (int i = 0; p.partial && i < 2; ++i)
      copy_head<E>(p, saved_product<E>(one, i), 0, 0, saved_product<E>(p, i), map, head, p.value_dim);
  }
}

size_t head_scratch(const Params& p) {
  return by_dtype(p, [&](auto e) { return HeadScratch<decltype(e)>(p, Scratch(nullptr)).size; });
}
void forward_by_heads(const Params& p, int64_t begin, int64_t end, void* scratch) {
  by_dtype(p, [&](auto e) { forward_heads<decltype(e)>(p, begin, end, scratch); });
}

// ---- by sweep and dtype

template <int Sweep>
int64_t forward_items(const Params& p) {
  return sweep_items(p, Sweep);
}
template <int Sweep>
size_t forward_scratch(const Params& p) {
  return p.dtype == DType::f64 ? ForwardScratch<double>(p, Sweep, Scratch(nullptr)).size
                               : ForwardScratch<float>(p, Sweep, Scratch(nullptr)).size;
}
template <int Sweep>
void forward(const Params& p, int64_t begin, int64_t end, void* scratch) {
  by_dtype(p, [&](auto e) { forward_range<decltype(e)>(p, Sweep, begin, end, scratch); });
}

}  // namespace

const Loop kCrissCrossForward[kSweeps] = {{forward_items<0>, forward_scratch<0>, forward<0>},
                                          {forward_items<1>, forward_scratch<1>, forward<1>},
                                          {forward_items<2>, forward_scratch<2>, forward<2>}};
const Loop kCrissCrossForwardHeads{head_items, head_scratch, forward_by_heads};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention
