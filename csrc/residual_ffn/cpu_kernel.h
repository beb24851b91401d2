// Between cpu.cpp, compiled once, and cpu_kernel.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "residual_ffn.h"

namespace vitkernels::residual_ffn {

// How the positions of the maps are cut into groups that fit a core's cache: whole images, or bands of rows
// of one.
struct Plan {
  int64_t images;  // images of a group; 1 where maps are cut into bands
  int bands;       // bands of a map
  int rows;        // rows of a band
  int64_t groups;
  bool by_rows;  // too few groups for the threads: they share each group, by rows of the matrices
};

// The stages of a group: u = x + dw(x), the hidden layer, the output. Each is computed for a range of rows
// (channels or hidden units), in units of kUnit; a stage needs all rows of the one before.
enum Stage { kInput, kHidden, kOutput, kStages };
constexpr int kUnit = 16;

struct CpuKernel {
  size_t (*group_bytes)(const Params&, const Plan&);   // u and the hidden layer of a group
  size_t (*thread_bytes)(const Params&, const Plan&);  // what a thread needs beside them
  void (*run)(const Params&, const Plan&, Stage, int64_t group, int begin, int end, void* group_scratch,
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

}  // namespace vitkernels::residual_ffn
