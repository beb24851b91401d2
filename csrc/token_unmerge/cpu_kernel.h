// Between cpu.cpp, compiled once, and cpu_kernel.cpp, compiled once per instruction set.
#pragma once
#include "token_unmerge.h"

namespace vitkernels::token_unmerge {

// Items [begin, end) of a call: groups or tokens of image after image, whatever items() of cpu.cpp counts.
struct CpuKernel {
  void (*forward)(const Params&, int64_t begin, int64_t end);
  void (*backward)(const Params&, int64_t begin, int64_t end);
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

}  // namespace vitkernels::token_unmerge
