// Calls over rows of tokens on the CPU, as merging and unmerging make them.
#pragma once
#include "vitkernels/parallel.h"
#include "vitkernels/params.h"

namespace vitkernels {

// fn on ranges that partition `items`, which are rows of a result or more than one row each. Params: batch,
// tokens, channels.
template <class Params>
void over_token_rows(const Params& p, void (*fn)(const Params&, int64_t begin, int64_t end), int64_t items,
                     int threads) {
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
