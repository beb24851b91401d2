// Reductions over the mask's columns and rows. A block of threads takes 32 columns, lanes side by side and
// its warps in turns down the rows; or a warp takes a row. A strip is read more than once, from L1 after the
// first time.
#pragma once
#include "tiles.h"

namespace vitkernels::learnable_token_merge {

constexpr int STRIP_WARPS = 8, STRIP_THREADS = 32 * STRIP_WARPS;
template <class Acc>
constexpr size_t STRIP_BYTES = sizeof(Acc) * STRIP_THREADS;

// The sum, or the maximum, of each lane's values over the warps, in their order. `scratch`: shared memory for
// a value a thread, free for reuse on return.
template <bool MAXIMUM, class Acc>
VK_DEVICE Acc over_warps(Acc value, Acc* scratch) {
  scratch[thread_x()] = value;
  sync_block();
  Acc total = scratch[lane_id()];
  VK_UNROLL
  for (int warp = 1; warp < STRIP_WARPS; ++warp) {
    const Acc other = scratch[warp * 32 + lane_id()];
    total = MAXIMUM ? (other > total ? other : total) : total + other;
  }
  sync_block();
  return total;
}

// The sum of a column of the mask. Everyone sums in this order, so that all agree on which sums are 0.
template <class Acc, class M>
VK_DEVICE Acc column_sum(const M* column, int64_t row_stride, int rows, Acc* scratch) {
  Acc sum = Acc(0);
  if (column != nullptr) {
    VK_UNROLL_4
    for (int row = warp_id(); row < rows; row += STRIP_WARPS) sum += to_accumulate(column[row * row_stride]);
  }
  return over_warps<false>(sum, scratch);
}

}  // namespace vitkernels::learnable_token_merge
