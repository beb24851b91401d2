// Between cpu.cpp, compiled once, and cpu_kernel*.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "attention_with_size.h"

namespace vitkernels::attention_with_size {

// A range of items [begin, end) is computed with `scratch` bytes of 64-byte aligned memory. What an item
// computes does not depend on the range, so results do not depend on the number of threads.
struct CpuKernel {
  int64_t (*items)(const Params&);
  size_t (*scratch)(const Params&);
  void (*run)(const Params&, int64_t begin, int64_t end, void* scratch);
};

// Items: forward (batch, head, tile of queries), backward (batch, head).
#define VITKERNELS_SIZED_ATTENTION_KERNELS(isa) \
  namespace isa {                               \
  extern const CpuKernel kForward, kBackward;   \
  }
VITKERNELS_SIZED_ATTENTION_KERNELS(baseline)
VITKERNELS_SIZED_ATTENTION_KERNELS(avx2)
VITKERNELS_SIZED_ATTENTION_KERNELS(avx512)
#undef VITKERNELS_SIZED_ATTENTION_KERNELS

}  // namespace vitkernels::attention_with_size
