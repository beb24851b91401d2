// Sums over tokens in parts: how they are cut, and the second pass that adds them in a fixed order.
#pragma once
#include "block_sparse_linear.h"
#include "vitkernels/device.h"

namespace vitkernels::block_sparse_linear {

// Blocks of threads that fill a large GPU about twice, and the fewest tokens that are worth a part of their
// own.
constexpr int64_t MANY_BLOCKS = 512, FEWEST_TOKENS = 128;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Parts {
  int64_t share = 0, count = 1;  // tokens of a part, parts

  // At most `most` equal parts, each a multiple of `multiple`.
  Parts(int64_t tokens, int64_t most, int64_t multiple) {
    share = ceil_div(tokens, most < 1 ? 1 : most);
    if (share < FEWEST_TOKENS) share = FEWEST_TOKENS;
    share = ceil_div(share, multiple) * multiple;
    if (tokens > 0) count = ceil_div(tokens, share);
  }
};

constexpr int REDUCE_THREADS = 256;

// result[i] = sum over count of partials[count][width], in order.
template <class Acc, class R>
VK_KERNEL void VK_LAUNCH_BOUNDS(REDUCE_THREADS, 1)
    reduce_kernel(const Acc* partials, int64_t count, int64_t width, R* result) {
  const int64_t i = static_cast<int64_t>(block_x()) * REDUCE_THREADS + thread_x();
  if (i >= width) return;
  Acc sum = Acc(0);
  for (int64_t n = 0; n < count; ++n) sum += partials[n * width + i];
  result[i] = from_accumulate<R>(sum);
}

template <class Acc, class R>
void reduce(const Acc* partials, int64_t count, int64_t width, R* result, Stream stream) {
  launch(reduce_kernel<Acc, R>, Dim3{ceil_div(width, REDUCE_THREADS)}, REDUCE_THREADS, 0, stream, partials,
         count, width, result);
}

}  // namespace vitkernels::block_sparse_linear
