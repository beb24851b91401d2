// Between cpu.cpp, compiled once, and cpu_kernel.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "polyline_path_scan.h"

namespace vitkernels::polyline_path_scan {

// Lines [begin, end) of an axis, counted as (image, head, line), with `scratch` bytes of 64-byte aligned
// memory. A line belongs to one call, so what is read may be what is written.
struct CpuKernel {
  size_t (*scratch)(const Params&);
  // to = the product of the masks and from, both tokens.
  void (*product)(const Params&, Axis, const View& from, const View& to, int64_t begin, int64_t end,
                  void* scratch);
  // to = the product of the masks and grad; the gradient of the axis's decays, values having been multiplied.
  void (*gradient)(const Params&, Axis, const View& grad, const View& values, const View& to, int64_t begin,
                   int64_t end, void* scratch);
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

}  // namespace vitkernels::polyline_path_scan
