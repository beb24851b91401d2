// The second pass of sums that blocks made in parts: partials [count][stride] to `elements` results, each in
// an order fixed by the sizes.
//
// Floor: the partials once. They lie in L2, so what costs is latency: many partials of few elements are
// shared by the warps of a block (a thread that adds 6272 of them one after another takes 39 us on an H200),
// and each thread has several loads in flight.
#pragma once
#include "vitkernels/device.h"

namespace vitkernels {

constexpr int SUM_THREADS = 256, SUM_WARPS = SUM_THREADS / 32, SUM_LOADS = 4;
// From here on the warps share them.
constexpr int64_t MANY_PARTIALS = 32;

// store.wants(element), store(element, sum). SHARED: a block has 32 elements, its warps every eighth partial
// of them, and the eight sums meet in order; else a thread has an element.
template <bool SHARED, class Acc, class Store>
VK_KERNEL void VK_LAUNCH_BOUNDS(SUM_THREADS, 1)
    sum_partials_kernel(const Acc* partials, int64_t stride, int64_t count, int64_t elements, Store store) {
  constexpr int WARPS = SHARED ? SUM_WARPS : 1;
  const int64_t element =
      static_cast<int64_t>(block_x()) * (SUM_THREADS / WARPS) + (SHARED ? lane_id() : thread_x());
  const bool wanted = element < elements && store.wants(element);
  Acc sums[SUM_LOADS] = {};
  if (wanted) {
    int64_t i = SHARED ? warp_id() : 0;
    for (; i + (SUM_LOADS - 1) * WARPS < count; i += SUM_LOADS * WARPS) {
      VK_UNROLL
      for (int n = 0; n < SUM_LOADS; ++n) sums[n] += partials[(i + n * WARPS) * stride + element];
    }
    for (; i < count; i += WARPS) sums[0] += partials[i * stride + element];
  }
  Acc sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if constexpr (SHARED) {
    auto* const of_warps = reinterpret_cast<Acc*>(shared_memory());
    of_warps[thread_x()] = sum;
    sync_block();
    if (warp_id() > 0) return;
    for (int warp = 1; warp < WARPS; ++warp) sum += of_warps[warp * 32 + lane_id()];
  }
  if (wanted) store(element, sum);
}

template <class Acc, class Store>
void sum_partials(const Acc* partials, int64_t stride, int64_t count, int64_t elements, const Store& store,
                  Stream stream) {
  if (count >= MANY_PARTIALS) {
    launch(sum_partials_kernel<true, Acc, Store>, Dim3{(elements + 31) / 32}, SUM_THREADS,
           SUM_THREADS * sizeof(Acc), stream, partials, stride, count, elements, store);
  } else {
    launch(sum_partials_kernel<false, Acc, Store>, Dim3{(elements + SUM_THREADS - 1) / SUM_THREADS},
           SUM_THREADS, 0, stream, partials, stride, count, elements, store);
  }
}

// Elements to rows of `columns` of a matrix of type R.
template <class R>
struct StoreRows {
  R* data;
  int64_t row_stride, columns;

  VK_DEVICE bool wants(int64_t) const { return true; }
  template <class Acc>
  VK_DEVICE void operator()(int64_t element, Acc sum) const {
    const int64_t row = element / columns;
    data[row * row_stride + (element - row * columns)] = from_accumulate<R>(sum);
  }
};

}  // namespace vitkernels
