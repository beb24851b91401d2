// Between cpu.cpp, compiled once, and cpu_kernel*.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "neighborhood_attention.h"

namespace vitkernels::neighborhood_attention {

// A range of items [begin, end) is computed with `scratch` bytes of 64-byte aligned memory. What an item
// computes does not depend on the range, so results do not depend on the number of threads.
struct CpuKernel {
  int64_t (*forward_items)(const Params&);
  size_t (*forward_scratch)(const Params&);
  void (*forward)(const Params&, int64_t begin, int64_t end, void* scratch);

  // Items: (chunk of groups, head). Each leaves its share of the bias gradient in
  // partials[chunk][head][entries], when that gradient is wanted; reduce_partials adds them up in order.
  int64_t (*backward_items)(const Params&);
  size_t (*backward_scratch)(const Params&);
  size_t (*partials_size)(const Params&);
  void (*backward)(const Params&, int64_t begin, int64_t end, void* scratch, void* partials);
  void (*reduce_partials)(const Params&, const void* partials);
};

// Whether each group of the dilation is one neighborhood, small enough to be one tile.
inline bool is_dense(const Params& p) {
  return !p.causal_h && !p.causal_w && p.kernel_h * p.dilation_h == p.height &&
         p.kernel_w * p.dilation_w == p.width && p.kernel_h * p.kernel_w <= 64;
}

namespace baseline {
extern const CpuKernel kShifted, kDense;
}
namespace avx2 {
extern const CpuKernel kShifted, kDense;
}
namespace avx512 {
extern const CpuKernel kShifted, kDense;
}

}  // namespace vitkernels::neighborhood_attention
