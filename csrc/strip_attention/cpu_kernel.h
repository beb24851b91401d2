// Between cpu.cpp, compiled once, and cpu_kernel*.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "strip_attention.h"

namespace vitkernels::strip_attention {

// A range of items [begin, end) is computed with `scratch` bytes of 64-byte aligned memory. What an item
// computes does not depend on the range, so results do not depend on the number of threads.
struct Forward {
  int64_t (*items)(const Params&);  // (batch, head, tile of queries)
  size_t (*scratch)(const Params&);
  void (*run)(const Params&, int64_t begin, int64_t end, void* scratch);
};

struct Backward {
  int64_t (*items)(const Params&);  // (batch, head, chunk of tiles of queries)
  size_t (*scratch)(const Params&);
  // Of all items together: what each adds to the gradients of keys and values, where a head has several.
  size_t (*partials)(const Params&);
  void (*run)(const Params&, int64_t begin, int64_t end, void* scratch, void* partials);
  // Adds the partials up, in order.
  int64_t (*reduce_items)(const Params&);  // (batch, head, tile of keys)
  void (*reduce)(const Params&, int64_t begin, int64_t end, void* partials);
};

#define VITKERNELS_STRIP_KERNELS(isa) \
  namespace isa {                     \
  extern const Forward kForward;      \
  extern const Backward kBackward;    \
  }
VITKERNELS_STRIP_KERNELS(baseline)
VITKERNELS_STRIP_KERNELS(avx2)
VITKERNELS_STRIP_KERNELS(avx512)
#undef VITKERNELS_STRIP_KERNELS

}  // namespace vitkernels::strip_attention
