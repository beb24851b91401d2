// Sums over tokens in parts: how they are cut, and the second pass that adds them in a fixed order.
#pragma once
#include "block_sparse_linear.h"
#include "vitkernels/sum_partials.h"

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

// result[i] = the sum over count of partials[count][width].
template <class Acc, class R>
void reduce(const Acc* partials, int64_t count, int64_t width, R* result, Stream stream) {
  sum_partials(partials, width, count, width, StoreRows<R>{result, 0, width}, stream);
}

}  // namespace vitkernels::block_sparse_linear
