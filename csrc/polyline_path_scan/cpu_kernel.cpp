// One-dimensional products with symmetric masks on one core, one instruction set.
//
// Floor: x and y cross memory once, an image and head staying in L2 between the axes; about four operations
// an element and axis. A line of tokens goes through the registers twice, from its end and from its start,
// with the channels of a head in the lanes; what the first way leaves for the second is in L1.
#include "cpu_kernel.h"

#include "vitkernels/matrix_cpu.h"
#include "vitkernels/simd.h"

namespace vitkernels::polyline_path_scan {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

namespace {

// Vectors of channels that go along a line together: chains of multiply-adds that do not wait for each other.
constexpr int kTogether = 4;

template <class T>
struct LineScratch {
  T *decays, *first, *second, *third, *fourth, *sums;
  size_t size;

  LineScratch(const Params& p, Scratch scratch) {
    constexpr size_t L = kLanes<T>;
    const size_t longest = p.height > p.width ? p.height : p.width, block = longest * kTogether * L;
    decays = scratch.take<T>(longest + L);
    first = scratch.take<T>(block);
    second = scratch.take<T>(block);
    third = scratch.take<T>(block);
    fourth = scratch.take<T>(block);
    sums = scratch.take<T>((longest + L) * L);
    size = scratch.used;
  }
};

// A line of tokens or decays of one head.
struct Line {
  int64_t offset, step;

  Line(const View& view, Axis axis, int64_t b, int64_t head, int line)
      : offset(b * view.stride[0] + line * view.stride[axis == Axis::rows ? 1 : 2] + head * view.stride[3]),
        step(view.stride[axis == Axis::rows ? 2 : 1]) {}
};

// to[i] = the decay between tokens i - 1 and i.
template <class T>
void load_decays(const View& view, DType dtype, const Line& line, int count, T* to) {
  with_dtype(dtype, [&](auto d) {
    using D = decltype(d);
    const D* from = static_cast<const D*>(view.data) + line.offset;
    for (int i = 0; i < count; ++i) to[i] = static_cast<T>(load_one(from + i * line.step));
  });
  for (int i = 0; i < count; i += kLanes<T>) store(to + i, exp_softmax<T>(load(to + i)));
  // Nothing comes before the first token. In the sums it would add nothing, but for the not a number that 0
  // times an infinity is.
  to[0] = 0;
}

// A few vectors of channels of a token, the last one possibly cut off.
template <class E, int N>
VITKERNELS_INLINE void load_token(const E* from, int channels, Vec<Compute<E>> (&to)[N]) {
  constexpr int L = kLanes<Compute<E>>;
#pragma GCC unroll 4
  for (int v = 0; v < N - 1; ++v) to[v] = load(from + v * L);
  to[N - 1] =
      channels == N * L ? load(from + (N - 1) * L) : load_first(from + (N - 1) * L, channels - (N - 1) * L);
}
template <class E, int N>
VITKERNELS_INLINE void store_token(E* to, int channels, const Vec<Compute<E>> (&from)[N]) {
  constexpr int L = kLanes<Compute<E>>;
#pragma GCC unroll 4
  for (int v = 0; v < N - 1; ++v) store(to + v * L, from[v]);
  if (channels == N * L)
    store(to + (N - 1) * L, from[N - 1]);
  else
    store_first(to + (N - 1) * L, from[N - 1], channels - (N - 1) * L);
}

// `channels` of N vectors, of all tokens of a line.
template <class E, int N>
void product_line(const LineScratch<Compute<E>>& s, int count, int channels, const E* from, int64_t from_step,
                  E* to, int64_t to_step) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  Vec<T> after[N] = {};  // a_(i+1) r_(i+1)
  for (int i = count - 1; i >= 0; --i) {
    Vec<T> x[N];
    load_token<E, N>(from + i * from_step, channels, x);
    T *values = s.first + static_cast<size_t>(i) * N * L, *later = s.second + static_cast<size_t>(i) * N * L;
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      store(values + v * L, x[v]);
      store(later + v * L, after[v]);
      after[v] = (x[v] + after[v]) * s.decays[i];
    }
  }
  Vec<T> f[N] = {};
  for (int i = 0; i < count; ++i) {
    const T *values = s.first + static_cast<size_t>(i) * N * L,
            *later = s.second + static_cast<size_t>(i) * N * L;
    Vec<T> y[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      f[v] = load(values + v * L) + f[v] * s.decays[i];
      y[v] = f[v] + load(later + v * L);
    }
    store_token<E, N>(to + i * to_step, channels, y);
  }
}

// The same of the gradient, and sums[i] += what token i's decay receives, lane by lane.
template <class E, int N>
void gradient_line(const LineScratch<Compute<E>>& s, int count, int channels, const E* grad,
                   int64_t grad_step, const E* from, int64_t from_step, E* to, int64_t to_step) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  Vec<T> after[N] = {}, grad_after[N] = {};
  for (int i = count - 1; i >= 0; --i) {
    Vec<T> x[N], g[N];
    load_token<E, N>(from + i * from_step, channels, x);
    load_token<E, N>(grad + i * grad_step, channels, g);
    const size_t at = static_cast<size_t>(i) * N * L;
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      const Vec<T> r = x[v] + after[v], lambda = g[v] + grad_after[v];
      store(s.first + at + v * L, x[v]);
      store(s.second + at + v * L, g[v]);
      store(s.third + at + v * L, r);
      store(s.fourth + at + v * L, lambda);
      after[v] = r * s.decays[i];
      grad_after[v] = lambda * s.decays[i];
    }
  }
  Vec<T> f[N] = {}, mu[N] = {};
  for (int i = 0; i < count; ++i) {
    const size_t at = static_cast<size_t>(i) * N * L;
    Vec<T> sum = load(s.sums + static_cast<size_t>(i) * L), out[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      const Vec<T> lambda = load(s.fourth + at + v * L);
      sum += lambda * f[v] + mu[v] * load(s.third + at + v * L);
      const Vec<T> before = mu[v] * s.decays[i];
      out[v] = lambda + before;
      mu[v] = load(s.second + at + v * L) + before;
      f[v] = load(s.first + at + v * L) + f[v] * s.decays[i];
    }
    store(s.sums + static_cast<size_t>(i) * L, sum);
    store_token<E, N>(to + i * to_step, channels, out);
  }
}

// Calls run(first channel, channels, Constant<vectors>) for blocks of up to kTogether vectors.
template <class T, class Run>
void by_channels(int channels, Run run) {
  constexpr int L = kLanes<T>;
  for (int c = 0; c < channels; c += kTogether * L) {
    const int count = imin(kTogether * L, channels - c);
    switch (ceil_div(count, L)) {
      case 1:
        run(c, count, Constant<1>{});
        break;
      case 2:
        run(c, count, Constant<2>{});
        break;
      case 3:
        run(c, count, Constant<3>{});
        break;
      default:
        run(c, count, Constant<4>{});
    }
  }
}

template <class E>
void product_range(const Params& p, Axis axis, const View& from, const View& to, int64_t begin, int64_t end,
                   void* memory) {
  using T = Compute<E>;
  const LineScratch<T> s(p, Scratch(memory));
  const int lines = p.lines(axis), count = p.length(axis);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t plane = item / lines, b = plane / p.heads, head = plane % p.heads;
    const int line = static_cast<int>(item % lines);
    const Line source(from, axis, b, head, line), target(to, axis, b, head, line);
    load_decays(p.decay(axis), p.decay_dtype, Line(p.decay(axis), axis, b, head, line), count, s.decays);
    by_channels<T>(p.head_dim, [&](int c, int channels, auto n) {
      product_line<E, decltype(n)::value>(s, count, channels,
                                          static_cast<const E*>(from.data) + source.offset + c, source.step,
                                          static_cast<E*>(to.data) + target.offset + c, target.step);
    });
  }
}

template <class E>
void gradient_range(const Params& p, Axis axis, const View& grad, const View& values, const View& to,
                    int64_t begin, int64_t end, void* memory) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  const LineScratch<T> s(p, Scratch(memory));
  const int lines = p.lines(axis), count = p.length(axis);
  const View& grad_decay = p.grad_decay(axis);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t plane = item / lines, b = plane / p.heads, head = plane % p.heads;
    const int line = static_cast<int>(item % lines);
    const Line upstream(grad, axis, b, head, line), source(values, axis, b, head, line),
        target(to, axis, b, head, line), decays(grad_decay, axis, b, head, line);
    load_decays(p.decay(axis), p.decay_dtype, Line(p.decay(axis), axis, b, head, line), count, s.decays);
    for (int i = 0; i < count * L; ++i) s.sums[i] = 0;
    by_channels<T>(p.head_dim, [&](int c, int channels, auto n) {
      gradient_line<E, decltype(n)::value>(
          s, count, channels, static_cast<const E*>(grad.data) + upstream.offset + c, upstream.step,
          static_cast<const E*>(values.data) + source.offset + c, source.step,
          static_cast<E*>(to.data) + target.offset + c, target.step);
    });
    for (int i = 0; i < count; i += L) {
      Vec<T> rows[L];
#pragma GCC unroll 16
      for (int q = 0; q < L; ++q) rows[q] = load(s.sums + static_cast<size_t>(i + q) * L);
      transpose<T>(rows);
      Vec<T> total = rows[0];
#pragma GCC unroll 16
      for (int q = 1; q < L; ++q) total += rows[q];
      store(s.sums + i, total * load(s.decays + i));
    }
    with_dtype(p.decay_dtype, [&](auto d) {
      using D = decltype(d);
      D* into = static_cast<D*>(grad_decay.data) + decays.offset;
      for (int i = 0; i < count; ++i) store_one(into + i * decays.step, static_cast<Compute<D>>(s.sums[i]));
    });
  }
}

// ---- by dtype

size_t scratch(const Params& p) {
  return p.dtype == DType::f64 ? LineScratch<double>(p, Scratch(nullptr)).size
                               : LineScratch<float>(p, Scratch(nullptr)).size;
}
void product(const Params& p, Axis axis, const View& from, const View& to, int64_t begin, int64_t end,
             void* memory) {
  with_dtype(p.dtype, [&](auto e) { product_range<decltype(e)>(p, axis, from, to, begin, end, memory); });
}
void gradient(const Params& p, Axis axis, const View& grad, const View& values, const View& to, int64_t begin,
              int64_t end, void* memory) {
  with_dtype(p.dtype,
             [&](auto e) { gradient_range<decltype(e)>(p, axis, grad, values, to, begin, end, memory); });
}

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel = {scratch, product, gradient};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_scan
