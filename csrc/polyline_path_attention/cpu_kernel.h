// Between cpu.cpp, compiled once, and cpu_kernel*.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "polyline_path_attention.h"

namespace vitkernels::polyline_path_attention {

// A range of items [begin, end) is computed with `scratch` bytes of 64-byte aligned memory. What an item
// computes does not depend on the range, so results do not depend on the number of threads.
struct Loop {
  int64_t (*items)(const Params&);
  size_t (*scratch)(const Params&);
  void (*run)(const Params&, int64_t begin, int64_t end, void* scratch);
};

// The criss-cross passes cross rows, which they gather on the way, then columns, and rows again; a sweep must
// be over when the next begins. Heads lie in params.workspace, those of one map side by side.
constexpr int kSweeps = 3;

// Whole maps of so few tokens have passes of their own, of which the backward needs no saved product with v;
// Python then allocates none.
constexpr int64_t kSmallMap = 256;

// `sums` fills cum, which all others read; where each item of a forward pass is a head of a small map, or
// goes through all sweeps, the item fills its part itself. Each item of the loops over heads takes one head
// of one map through all sweeps, in scratch that holds the head and what a line needs: the same results, with
// less memory traffic where a head fits into a cache.
#define VITKERNELS_POLYLINE_LOOPS(isa)                                                   \
  namespace isa {                                                                        \
  extern const Loop kSums, kWholeForward, kWholeBackward, kSmallForward, kSmallBackward; \
  extern const Loop kCrissCrossForward[kSweeps], kCrissCrossBackward[kSweeps];           \
  extern const Loop kCrissCrossForwardHeads, kCrissCrossBackwardHeads;                   \
  }
VITKERNELS_POLYLINE_LOOPS(baseline)
VITKERNELS_POLYLINE_LOOPS(avx2)
VITKERNELS_POLYLINE_LOOPS(avx512)
#undef VITKERNELS_POLYLINE_LOOPS

}  // namespace vitkernels::polyline_path_attention
