// Between cpu.cpp, compiled once, and the kernels, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "kan_linear.h"

namespace vitkernels::kan_linear {

// How a call is cut into items, which depends on the number of threads; no result depends on the cut.
struct Cut {
  int rows;      // of a block of the forward pass
  int segments;  // of its output channels
  int channels;  // of an item of the backward pass
  int64_t row_blocks;
};

// Ranges of items [begin, end) are computed with `scratch` bytes of 64-byte aligned memory a thread.
struct CpuKernel {
  Cut (*cut)(const Params&, int threads);

  // Items: (block of rows, segment of outputs).
  size_t (*forward_scratch)(const Params&, const Cut&);
  void (*forward)(const Params&, const Cut&, int64_t begin, int64_t end, void* scratch);

  // Items: slices of channels, each for all rows. `shared` holds what all items write: the gradient of u, and
  // of each basis function's centre.
  size_t (*shared_size)(const Params&);
  size_t (*backward_scratch)(const Params&, const Cut&);
  void (*backward)(const Params&, const Cut&, int64_t begin, int64_t end, void* scratch, void* shared);
  // Then, rows [begin, end) of grad_x, and the gradient of the grid.
  void (*backward_rows)(const Params&, int64_t begin, int64_t end, void* shared);
  void (*backward_grid)(const Params&, void* shared);
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

}  // namespace vitkernels::kan_linear
