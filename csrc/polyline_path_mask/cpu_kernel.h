// Between cpu.cpp, compiled once, and cpu_kernel.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "polyline_path_mask.h"

namespace vitkernels::polyline_path_mask {

// Ranges of items [begin, end) are computed with `scratch` bytes of 64-byte aligned memory a thread. What an
// item computes does not depend on the range.
struct CpuKernel {
  // Items: (image and head, query row). `stream` writes past the caches.
  size_t (*forward_scratch)(const Params&);
  void (*forward)(const Params&, bool stream, int64_t begin, int64_t end, void* scratch);

  // Items: (image and head, owner). Each writes the gradient of the decays along its own line, and leaves its
  // share of the other gradient in partials[item][tokens].
  size_t (*backward_scratch)(const Params&);
  size_t (*partials_size)(const Params&);
  void (*backward)(const Params&, int64_t begin, int64_t end, void* scratch, void* partials);
  // Then, items (image and head): adds the shares up in order.
  void (*reduce_partials)(const Params&, int64_t begin, int64_t end, const void* partials);
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

}  // namespace vitkernels::polyline_path_mask
