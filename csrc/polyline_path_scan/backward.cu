// Backward: what the first product made is made again, in the place of the gradient of x; then each axis, the
// second first, multiplies the gradient, in place, and leaves the gradients of its decays.
//
// Floor: three times forward's traffic, less where no decay of the second axis wants a gradient. A group of
// lanes has the channels of a head, so that what a decay receives is summed across them by shuffles.
#include "lines.h"

namespace vitkernels::polyline_path_scan {
namespace {

template <class T, class D, int N>
VK_KERNEL void VK_LAUNCH_BOUNDS(MOST_THREADS, 3)
    gradient_kernel(Grid grid, int lanes, Tokens decays, Tokens grad_decays, Tokens grad, Tokens values,
                    Tokens to) {
  using Acc = accumulate_t<T>;
  const int threads = block_dim_x(), vectors = grid.head_dim / N, segments = grid.segments();
  Acc* states = reinterpret_cast<Acc*>(shared_memory()) + thread_x();
  const int groups = threads / lanes, group = thread_x() / lanes, lane = thread_x() % lanes;
  // Between blocks of channels: what the decays of the group's line have received.
  Acc* received =
      reinterpret_cast<Acc*>(shared_memory()) + static_cast<int64_t>(segments) * 2 * N * threads + group;
  int64_t index = static_cast<int64_t>(block_x()) * groups + group;
  const bool exists = index < grid.all_lines();
  if (!exists) index = 0;
  const int head = static_cast<int>(index % grid.heads);
  index /= grid.heads;
  const int line = static_cast<int>(index % grid.lines);
  const int64_t b = index / grid.lines;
  const D* decay = decays.at<const D>(b, line, head);
  D* grad_decay = grad_decays.at<D>(b, line, head);

  for (int block = 0; block < vectors; block += lanes) {
    const bool active = exists && block + lane < vectors, last = block + lanes >= vectors;
    const int c = active ? (block + lane) * N : 0;
    const T* upstream = grad.at<const T>(b, line, head) + c;
    const T* source = values.at<const T>(b, line, head) + c;
    T* target = to.at<T>(b, line, head) + c;
    const int length = active ? grid.length : 0;  // an idle lane sees zeros

    Acc x[SEGMENT][N], g[SEGMENT][N], a[SEGMENT], after[N] = {}, grad_after[N] = {};
    VK_ROLLED
    for (int segment = segments - 1; segment >= 0; --segment) {
      VK_UNROLL
      for (int v = 0; v < N; ++v) {
        states[(2 * segment * N + v) * threads] = after[v];
        states[((2 * segment + 1) * N + v) * threads] = grad_after[v];
      }
      if (segment == 0) break;
      load_decays(a, decay, decays.place, segment * SEGMENT, grid.length);
      load_tokens(x, source, values.place, segment * SEGMENT, length);
      load_tokens(g, upstream, grad.place, segment * SEGMENT, length);
      VK_UNROLL
      for (int q = SEGMENT - 1; q >= 0; --q) {
        VK_UNROLL
        for (int v = 0; v < N; ++v) {
          after[v] = (x[q][v] + after[v]) * a[q];
          grad_after[v] = (g[q][v] + grad_after[v]) * a[q];
        }
      }
    }
    Acc f[N] = {}, mu[N] = {};
    VK_ROLLED
    for (int segment = 0; segment < segments; ++segment) {
      const int first = segment * SEGMENT;
      load_decays(a, decay, decays.place, first, grid.length);
      load_tokens(x, source, values.place, first, length);
      load_tokens(g, upstream, grad.place, first, length);
      Acc r[SEGMENT][N], lambda[SEGMENT][N];
      VK_UNROLL
      for (int v = 0; v < N; ++v) {
        after[v] = states[(2 * segment * N + v) * threads];
        grad_after[v] = states[((2 * segment + 1) * N + v) * threads];
      }
      VK_UNROLL
      for (int q = SEGMENT - 1; q >= 0; --q) {
        VK_UNROLL
        for (int v = 0; v < N; ++v) {
          r[q][v] = x[q][v] + after[v];
          lambda[q][v] = g[q][v] + grad_after[v];
          after[v] = r[q][v] * a[q];
          grad_after[v] = lambda[q][v] * a[q];
        }
      }
      VK_UNROLL
      for (int q = 0; q < SEGMENT; ++q) {
        Vec<T, N> out;
        Acc sum = Acc(0);
        VK_UNROLL
        for (int v = 0; v < N; ++v) {
          sum += lambda[q][v] * f[v] + mu[v] * r[q][v];
          const Acc before = mu[v] * a[q];
          out[v] = from_accumulate<T>(lambda[q][v] + before);
          mu[v] = g[q][v] + before;
          f[v] = x[q][v] + f[v] * a[q];
        }
        if (first + q < length) out.store(target + (first + q) * to.place);
        for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
        if (lane == 0 && exists && first + q < grid.length) {
          if (block > 0) sum += received[(first + q) * groups];
          if (last)
            grad_decay[(first + q) * grad_decays.place] =
                from_accumulate<D>(static_cast<accumulate_t<D>>(sum * a[q]));
          else
            received[(first + q) * groups] = sum;
        }
      }
    }
  }
}

template <class T, class D, int N>
void launch_gradient(const Grid& grid, const Tokens& decays, const Tokens& grad_decays, const Tokens& grad,
                     const Tokens& values, const Tokens& to, Stream stream) {
  using Acc = accumulate_t<T>;
  int lanes = 1;
  while (lanes < 32 && lanes < grid.head_dim / N) lanes *= 2;
  const size_t bytes = sizeof(Acc) * 2 * N * grid.segments();
  const int threads = threads_for(bytes);
  const int64_t groups = threads / lanes;
  const size_t between = grid.head_dim / N > lanes ? sizeof(Acc) * groups * grid.length : 0;
  const size_t shared = threads * bytes + between;
  check_shared(shared);
  launch(gradient_kernel<T, D, N>, Dim3{(grid.all_lines() + groups - 1) / groups}, threads, shared, stream,
         grid, lanes, decays, grad_decays, grad, values, to);
}

void launch_gradient(const Params& p, Axis axis, const View& grad, const View& values, const View& to,
                     Stream stream) {
  const Grid grid(p, axis);
  const Tokens decays(p.decay(axis), axis), grad_decays(p.grad_decay(axis), axis);
  const Tokens upstream(grad, axis), source(values, axis), target(to, axis);
  with_dtypes(p.dtype, p.decay_dtype, [&](auto element, auto decay) {
    using T = decltype(element);
    using D = decltype(decay);
    if constexpr (sizeof(T) <= 4)
      if (p.head_dim % 2 == 0 && upstream.aligned(sizeof(T), 2) && source.aligned(sizeof(T), 2) &&
          target.aligned(sizeof(T), 2))
        return launch_gradient<T, D, 2>(grid, decays, grad_decays, upstream, source, target, stream);
    launch_gradient<T, D, 1>(grid, decays, grad_decays, upstream, source, target, stream);
  });
}

}  // namespace

void backward_cuda(const Params& p, Stream stream) {
  const Axis first = p.axis(0), second = p.axis(1);
  if (p.grad_decay(second)) {
    launch_product(p, first, p.x, p.buffer, stream);
    launch_gradient(p, second, p.grad_y, p.buffer, p.buffer, stream);
  } else {
    launch_product(p, second, p.grad_y, p.buffer, stream);
  }
  if (p.grad_decay(first))
    launch_gradient(p, first, p.buffer, p.x, p.buffer, stream);
  else if (p.wants_x)
    launch_product(p, first, p.buffer, p.buffer, stream);
}

}  // namespace vitkernels::polyline_path_scan
