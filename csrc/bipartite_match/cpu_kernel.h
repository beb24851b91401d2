// Between cpu.cpp, compiled once, and cpu_kernel.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "bipartite_match.h"

namespace vitkernels::bipartite_match {

// What the threads on one image share. Scores are of the type computed in: double for f64, else float.
struct Image {
  int64_t number;
  void* odds;       // the odd tokens at length 1, packed in panels
  void* best;       // each even token's highest score, -2 where it has none
  int32_t* choice;  // and the odd token that it is reached at
};

struct CpuKernel {
  int panel_odds, tile_evens;  // tokens in a panel, in a tile
  size_t (*odds_bytes)(const Params&);
  size_t (*evens_bytes)(const Params&);  // of a thread's own memory
  void (*pack_panels)(const Params&, const Image&, int64_t begin, int64_t end);
  void (*score_tiles)(const Params&, const Image&, int64_t begin, int64_t end, void* evens);
};

// For one dtype: panels are twice as wide in float.
struct CpuKernels {
  CpuKernel f32, f64;
};

namespace baseline {
extern const CpuKernels kKernels;
}
namespace avx2 {
extern const CpuKernels kKernels;
}
namespace avx512 {
extern const CpuKernels kKernels;
}

}  // namespace vitkernels::bipartite_match
