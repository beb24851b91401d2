// Between cpu.cpp, compiled once, and cpu_kernel.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "block_sparse_linear.h"

namespace vitkernels::block_sparse_linear {

// A pass goes through the tokens in slices. Of each, all threads pack what the products read in a layout of
// their own, wait for each other, and multiply; while one still multiplies, another may pack the next slice,
// so that there are two buffers where there are slices to come.
struct Plan {
  int64_t slices, slice;            // slices, tokens of one
  size_t inputs, outputs, weights;  // bytes: x and grad_y of one slice, the values, in the compute type
  size_t thread;                    // bytes that each thread needs for itself
};

// What all threads share during a call; inputs and outputs are the present slice's.
struct Shared {
  void *inputs, *outputs, *weights;
};

// The present slice, and which of the threads runs. No result depends on how many there are.
struct Part {
  int64_t slice;
  int rank, size;
};

struct CpuKernel {
  Plan (*plan)(const Params&, bool backward);
  void (*pack)(const Params&, bool backward, const Plan&, const Part&, const Shared&);
  void (*multiply)(const Params&, bool backward, const Plan&, const Part&, const Shared&,
                   void* thread_scratch);
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

}  // namespace vitkernels::block_sparse_linear
