// The residue groups of a dilation on the CPU, and what both CPU kernels do with the bias. Compiled once per
// instruction set.
#pragma once
#include "cpu_kernel.h"
#include "vitkernels/matrix_cpu.h"

namespace vitkernels::neighborhood_attention {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

// One axis of one group: `size` tokens, of which token c sees [first(c), last(c)).
struct Axis {
  int size, kernel;
  bool causal;

  int first(int c) const {
    if (causal) return c < kernel ? 0 : c - kernel + 1;
    const int start = c < kernel / 2 ? 0 : c - kernel / 2;
    return imin(start, size - kernel);
  }
  int last(int c) const { return causal ? c + 1 : first(c) + kernel; }
};

// One group of one head of one map.
struct Group {
  int64_t batch;
  int head, offset_y, offset_x, step_y, step_x;
  Axis y, x;

  // `index` counts (map, group); groups count row by row.
  Group(const Params& p, int64_t index, int head) : head(head), step_y(p.dilation_h), step_x(p.dilation_w) {
    const int64_t groups = static_cast<int64_t>(step_y) * step_x;
    batch = index / groups;
    offset_y = static_cast<int>(index % groups) / step_x;
    offset_x = static_cast<int>(index % groups) % step_x;
    y = {p.height / step_y + (offset_y < p.height % step_y), p.kernel_h, p.causal_h};
    x = {p.width / step_x + (offset_x < p.width % step_x), p.kernel_w, p.causal_w};
  }

  template <class E>
  E* token(const View& view, int cy, int cx) const {
    return static_cast<E*>(view.data) + batch * view.stride[0] + (offset_y + cy * step_y) * view.stride[1] +
           (offset_x + cx * step_x) * view.stride[2] + head * view.stride[3];
  }
  ptrdiff_t stride(const View& view) const { return step_x * view.stride[2]; }

  // Tokens lie too far apart for the hardware to see them coming.
  template <class E>
  void prefetch(const View& view, int cy, int cx, int count, int channels) const {
    if (cy >= y.size) return;
    const int last = imin(cx + count, x.size);
    for (int c = cx; c < last; ++c) {
      const char* at = reinterpret_cast<const char*>(token<const E>(view, cy, c));
      for (int byte = 0; byte < channels * static_cast<int>(sizeof(E)); byte += 64)
        __builtin_prefetch(at + byte, 0, 2);
    }
  }
};

VITKERNELS_INLINE int64_t group_count(const Params& p) {
  return p.batch * p.dilation_h * p.dilation_w;
}
VITKERNELS_INLINE int longest(int size, int dilation) {
  return ceil_div(size, dilation);
}

// ---- chunks of groups, the backward pass's share of work

constexpr int64_t kMaxChunks = 64;

static int64_t chunk_groups(const Params& p) {
  return (group_count(p) + kMaxChunks - 1) / kMaxChunks;
}
static int64_t chunk_count(const Params& p) {
  return (group_count(p) + chunk_groups(p) - 1) / chunk_groups(p);
}
static int64_t backward_items(const Params& p) {
  return p.heads * chunk_count(p);
}
static size_t partials_size(const Params& p) {
  return static_cast<size_t>(backward_items(p)) * p.entries() *
         (p.dtype == DType::f64 ? sizeof(double) : sizeof(float));
}

// ---- the bias of one head

template <class B, class T>
static void read_bias_as(const Params& p, int head, T* to) {
  const B* from = static_cast<const B*>(p.rpb.data) + head * p.rpb.stride[0];
  for (int y = 0; y < 2 * p.kernel_h - 1; ++y)
    for (int x = 0; x < 2 * p.kernel_w - 1; ++x)
      *to++ = static_cast<T>(load_one(from + y * p.rpb.stride[1] + x * p.rpb.stride[2]));
}
template <class T>
static void read_bias(const Params& p, int head, T* to) {
  with_dtype(p.rpb_dtype, [&](auto element) { read_bias_as<decltype(element)>(p, head, to); });
}

template <class T, class B>
static void reduce_as(const Params& p, const T* partials) {
  const int64_t chunks = chunk_count(p), entries = p.entries();
  const int columns = 2 * p.kernel_w - 1;
  for (int64_t h = 0; h < p.heads; ++h) {
    B* to = static_cast<B*>(p.grad_rpb.data) + h * p.grad_rpb.stride[0];
    for (int64_t t = 0; t < entries; ++t) {
      T sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partials[(c * p.heads + h) * entries + t];
      store_one(to + t / columns * p.grad_rpb.stride[1] + t % columns * p.grad_rpb.stride[2],
                static_cast<Compute<B>>(sum));
    }
  }
}
template <class T>
static void reduce(const Params& p, const void* partials) {
  const T* from = static_cast<const T*>(partials);
  with_dtype(p.rpb_dtype, [&](auto element) { reduce_as<T, decltype(element)>(p, from); });
}
static void reduce_partials(const Params& p, const void* partials) {
  p.dtype == DType::f64 ? reduce<double>(p, partials) : reduce<float>(p, partials);
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::neighborhood_attention
