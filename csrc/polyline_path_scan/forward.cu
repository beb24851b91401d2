// Forward: two products along lines, columns then rows, or rows then columns.
//
// Floor: x read and y written once an axis over the bandwidth; the second way along a line finds it in L2.
// The second product works in place, so nothing is stored beside y.
#include "lines.h"

namespace vitkernels::polyline_path_scan {
namespace {

template <class T, class D, int N>
VK_KERNEL void VK_LAUNCH_BOUNDS(MOST_THREADS, 4)
    product_kernel(Grid grid, Tokens decays, Tokens from, Tokens to) {
  using Acc = accumulate_t<T>;
  const int threads = block_dim_x(), vectors = grid.head_dim / N, segments = grid.segments();
  Acc* states = reinterpret_cast<Acc*>(shared_memory()) + thread_x();
  // Neighbors are neighbors in memory: channels, heads, and lines if those are columns.
  int64_t index = static_cast<int64_t>(block_x()) * threads + thread_x();
  if (index >= grid.all_lines() * vectors) return;
  const int c = static_cast<int>(index % vectors) * N;
  index /= vectors;
  const int head = static_cast<int>(index % grid.heads);
  index /= grid.heads;
  const int line = static_cast<int>(index % grid.lines);
  const int64_t b = index / grid.lines;
  const D* decay = decays.at<const D>(b, line, head);
  const T* source = from.at<const T>(b, line, head) + c;
  T* target = to.at<T>(b, line, head) + c;

  Acc x[SEGMENT][N], a[SEGMENT], after[N] = {};
  VK_ROLLED
  for (int segment = segments - 1; segment >= 0; --segment) {
    VK_UNROLL
    for (int v = 0; v < N; ++v) states[(segment * N + v) * threads] = after[v];
    if (segment == 0) break;
    load_decays(a, decay, decays.place, segment * SEGMENT, grid.length);
    load_tokens(x, source, from.place, segment * SEGMENT, grid.length);
    VK_UNROLL
    for (int q = SEGMENT - 1; q >= 0; --q) {
      VK_UNROLL
      for (int v = 0; v < N; ++v) after[v] = (x[q][v] + after[v]) * a[q];
    }
  }
  Acc f[N] = {};
  VK_ROLLED
  for (int segment = 0; segment < segments; ++segment) {
    const int first = segment * SEGMENT;
    load_decays(a, decay, decays.place, first, grid.length);
    load_tokens(x, source, from.place, first, grid.length);
    Acc later[SEGMENT][N];
    VK_UNROLL
    for (int v = 0; v < N; ++v) after[v] = states[(segment * N + v) * threads];
    VK_UNROLL
    for (int q = SEGMENT - 1; q >= 0; --q) {
      VK_UNROLL
      for (int v = 0; v < N; ++v) {
        later[q][v] = after[v];
        after[v] = (x[q][v] + after[v]) * a[q];
      }
    }
    VK_UNROLL
    for (int q = 0; q < SEGMENT; ++q) {
      Vec<T, N> y;
      VK_UNROLL
      for (int v = 0; v < N; ++v) {
        f[v] = x[q][v] + f[v] * a[q];
        y[v] = from_accumulate<T>(f[v] + later[q][v]);
      }
      if (first + q < grid.length) y.store(target + (first + q) * to.place);
    }
  }
}

template <class T, class D, int N>
void launch_product(const Grid& grid, const Tokens& decays, const Tokens& from, const Tokens& to,
                    Stream stream) {
  const size_t bytes = sizeof(accumulate_t<T>) * N * grid.segments();
  const int threads = threads_for(bytes);
  const int64_t items = grid.all_lines() * (grid.head_dim / N);
  check_shared(threads * bytes);
  launch(product_kernel<T, D, N>, Dim3{(items + threads - 1) / threads}, threads, threads * bytes, stream,
         grid, decays, from, to);
}

}  // namespace

void launch_product(const Params& p, Axis axis, const View& from, const View& to, Stream stream) {
  const Grid grid(p, axis);
  const Tokens decays(p.decay(axis), axis), source(from, axis), target(to, axis);
  with_dtypes(p.dtype, p.decay_dtype, [&](auto element, auto decay) {
    using T = decltype(element);
    using D = decltype(decay);
    if constexpr (sizeof(T) <= 4)
      if (p.head_dim % 2 == 0 && source.aligned(sizeof(T), 2) && target.aligned(sizeof(T), 2))
        return launch_product<T, D, 2>(grid, decays, source, target, stream);
    launch_product<T, D, 1>(grid, decays, source, target, stream);
  });
}

void forward_cuda(const Params& p, Stream stream) {
  launch_product(p, p.axis(0), p.x, p.y, stream);
  launch_product(p, p.axis(1), p.y, p.y, stream);
}

}  // namespace vitkernels::polyline_path_scan
