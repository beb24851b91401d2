// Between cpu.cpp, compiled once, and cpu_kernel.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "block_sparse_linear.h"

namespace vitkernels::block_sparse_linear {

// What all threads share during a call, in the compute type: the operands as the products read them. An
// operand is packed when its size is not 0.
struct Shared {
  void *inputs, *outputs, *weights;
};

// The steps of a call; a step needs the ones before it. Items are divided among threads, and no result
// depends on how.
enum Step {
  kPackInputs,      // items: chunks of tokens of x, as blocks of its features
  kPackOutputs,     // the same of grad_y, taken through the activation's derivative
  kPackWeights,     // items: stored blocks, in the order of the product to come
  kForward,         // items: shares of the product x W^T
  kBackward,        // items: shares of the product that is the gradient of x
  kGradientValues,  // items: stored blocks
  kGradientBias,    // items: blocks of features
};

// Whether the forward pass reads x where it lies: what needs no conversion is not copied for one product.
static inline bool reads_in_place(const Params& p) {
  return p.dtype == DType::f32 || p.dtype == DType::f64;
}

struct CpuKernel {
  size_t (*shared_bytes)(const Params&, Step packing, bool backward);
  size_t (*thread_bytes)(const Params&, Step);
  int64_t (*items)(const Params&, Step, int threads);
  // `items_in_all` is what items() gave. `backward` tells which way the packed weights point.
  void (*run)(const Params&, Step, bool backward, int64_t begin, int64_t end, int64_t items_in_all,
              const Shared&, void* thread_scratch);
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
