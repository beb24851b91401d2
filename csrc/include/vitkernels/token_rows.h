// Calls over rows of tokens on the CPU, as merging and unmerging make them.
#pragma once
#include "vitkernels/fresh_memory.h"
#include "vitkernels/parallel.h"
#include "vitkernels/params.h"

namespace vitkernels {

// fn on ranges that partition the rows of `result` [batch, rows, channels]; of other `items`, where not every
// row is one. Params: batch, tokens, channels, dtype.
template <class Params>
void over_token_rows(const Params& p, void (*fn)(const Params&, int64_t begin, int64_t end),
                     const View& result, int64_t rows, int64_t items, int threads) {
  if (result.stride[1] == p.channels && result.stride[0] == rows * p.channels) {  // one block of memory
    const size_t element = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
    expect_large_result(result.data, static_cast<size_t>(p.batch * rows * p.channels) * element);
  }
  struct Loop {
    const Params& params;
    void (*fn)(const Params&, int64_t, int64_t);
  } loop{p, fn};
  const double elements = static_cast<double>(p.batch) * p.tokens * p.channels;
  parallel_for(
      items, worthwhile_threads(4 * elements, items, threads),
      [](void* context, int64_t begin, int64_t end, int) {
        const Loop& l = *static_cast<Loop*>(context);
        l.fn(l.params, begin, end);
      },
      &loop);
}

}  // namespace vitkernels
