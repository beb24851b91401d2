// Between cpu.cpp, compiled once, and cpu_kernel*.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "learnable_token_merge.h"

namespace vitkernels::learnable_token_merge {

// A pass over items [begin, end) with `scratch` bytes of 64-byte aligned memory for each thread and `shared`
// bytes for all. What an item computes does not depend on the range, so results do not depend on the number
// of threads.
struct CpuPass {
  int64_t (*items)(const Params&);
  size_t (*scratch)(const Params&);
  void (*run)(const Params&, int64_t begin, int64_t end, void* scratch, void* shared);
};

struct CpuKernel {
  CpuPass forward;     // items: (batch, slice of channels of z or other)
  CpuPass tokens;      // the gradients of z and other; items: the same
  CpuPass mask_sums;   // leaves sums of z dy^T in shared; items: (chunk of the batch, slice of merged tokens)
  CpuPass mask_chain;  // the gradient of g from them; items: (mask, slice of its rows or columns)
  size_t (*shared)(const Params&);
};

namespace baseline {
extern const CpuKernel kKernel;
}
namespace avx2 {
extern const CpuKernel kKernel;
}
namespace avx512 {
extern const CpuKernel kKernel;
}

}  // namespace vitkernels::learnable_token_merge
