// Calls over rows of tokens on the CPU, as merging and unmerging make them.
#pragma once
#include <stdexcept>

#include "vitkernels/parallel.h"
#include "vitkernels/params.h"

namespace vitkernels {

// Throws unless rows, starts and members are one partition of each image's tokens: whoever edits a plan gets
// an error and not another's memory. A few comparisons a token, of which all channels are read.
template <class Params>
void check_partition(const Params& p) {
  const auto* rows = static_cast<const int32_t*>(p.rows.data);
  const auto* starts = static_cast<const int32_t*>(p.starts.data);
  const auto* members = static_cast<const int32_t*>(p.members.data);
  for (int64_t b = 0; b < p.batch; ++b) {
    bool right = starts[0] == 0 && starts[p.merged_tokens] == p.tokens;
    for (int64_t g = 0; right && g < p.merged_tokens; ++g) {
      right = starts[g] < starts[g + 1] && starts[g + 1] <= p.tokens;
      int32_t before = -1;  // rising tokens, each in the row of its group: nobody twice
      for (int64_t i = starts[g]; right && i < starts[g + 1]; ++i) {
        right = members[i] > before && members[i] < p.tokens && rows[members[i]] == g;
        before = members[i];
      }
    }
    if (!right)
      throw std::invalid_argument(
          "argument `plan`: expected rows, starts and members of one partition of each image's tokens; got "
          "others. MergePlan.from_rows(rows, merged_tokens) makes a plan.");
    rows += p.tokens;
    starts += p.merged_tokens + 1;
    members += p.tokens;
  }
}

// fn on ranges that partition `items`, which are rows of a result or more than one row each. Params: batch,
// tokens, merged_tokens, channels; rows, starts, members.
template <class Params>
void over_token_rows(const Params& p, void (*fn)(const Params&, int64_t begin, int64_t end), int64_t items,
                     int threads) {
  check_partition(p);
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
