// What the CUDA kernels of the polyline path scan share: how lines of tokens lie in memory, and how much of a
// line a thread holds.
//
// A thread has N neighboring channels of a line and goes along it twice: from its end, which leaves the state
// at the start of every segment in shared memory, and from its start, where each segment is in registers and
// both directions meet. So what is read may be what is written.
#pragma once
#include "polyline_path_scan.h"
#include "vitkernels/device.h"

// Unrolled copies of a segment would take the registers of twice as many threads.
#define VK_ROLLED _Pragma("unroll 1")

namespace vitkernels::polyline_path_scan {

constexpr int SEGMENT = 8;  // tokens in registers: independent loads
constexpr int MOST_THREADS = 128;
constexpr size_t FEW_BYTES = 48 * 1024;
constexpr size_t SHARED_LIMIT = 99 * 1024;  // of a block of sm_86, sm_89 and sm_120

// Tokens or decays of one axis: [batch][line][place][head].
struct Tokens {
  void* data;
  int64_t batch, line, place, head;

  Tokens(const View& view, Axis axis)
      : data(view.data),
        batch(view.stride[0]),
        line(view.stride[axis == Axis::rows ? 1 : 2]),
        place(view.stride[axis == Axis::rows ? 2 : 1]),
        head(view.stride[3]) {}

  template <class T>
  VK_DEVICE T* at(int64_t b, int64_t which, int64_t of_head) const {
    return static_cast<T*>(data) + b * batch + which * line + of_head * head;
  }
  // Whether groups of `count` elements start at multiples of themselves.
  bool aligned(size_t size, int count) const {
    return reinterpret_cast<uintptr_t>(data) % (size * count) == 0 && batch % count == 0 &&
           line % count == 0 && place % count == 0 && head % count == 0;
  }
};

struct Grid {
  int64_t batch;
  int heads, lines, length, head_dim;

  Grid(const Params& p, Axis axis)
      : batch(p.batch), heads(p.heads), lines(p.lines(axis)), length(p.length(axis)), head_dim(p.head_dim) {}
  VK_HOST_DEVICE int segments() const { return (length + SEGMENT - 1) / SEGMENT; }
  VK_HOST_DEVICE int64_t all_lines() const { return batch * lines * heads; }
};

// The decays before the tokens of a segment. Nothing comes before a line, and nothing is beyond it.
template <class D, class Acc>
VK_DEVICE void load_decays(Acc (&to)[SEGMENT], const D* from, int64_t step, int first, int length) {
  VK_UNROLL
  for (int q = 0; q < SEGMENT; ++q) {
    const int i = first + q;
    to[q] = i > 0 && i < length ? exp_(static_cast<Acc>(to_accumulate(from[i * step]))) : Acc(0);
  }
}

template <class T, int N, class Acc>
VK_DEVICE void load_tokens(Acc (&to)[SEGMENT][N], const T* from, int64_t step, int first, int length) {
  VK_UNROLL
  for (int q = 0; q < SEGMENT; ++q) {
    Vec<T, N> token{};
    if (first + q < length) token = Vec<T, N>::load(from + (first + q) * step);
    VK_UNROLL
    for (int v = 0; v < N; ++v) to[q][v] = first + q < length ? to_accumulate(token[v]) : Acc(0);
  }
}

// Fewer threads a block where lines are long, so that the states of their segments fit.
inline int threads_for(size_t bytes_a_thread) {
  int threads = MOST_THREADS;
  while (threads > 32 && threads * bytes_a_thread > FEW_BYTES) threads /= 2;
  return threads;
}

inline void check_shared(size_t bytes) {
  if (bytes > SHARED_LIMIT)
    throw std::runtime_error("polyline path scan: lines that long need " + std::to_string(bytes) +
                             " bytes of shared memory, the limit is " + std::to_string(SHARED_LIMIT));
}

// to = the product of the axis's masks and from.
void launch_product(const Params& p, Axis axis, const View& from, const View& to, Stream stream);

}  // namespace vitkernels::polyline_path_scan
