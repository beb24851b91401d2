// Cascaded group attention on the CPU, one instruction set.
//
// Floor of a window of N tokens, forward: 2 N (h (2k + d) d + k sum_i kappa_i^2 + h k N + C N + C^2) FLOPs and h N^2
// exponentials, at 2 FMAs a cycle; the map crosses memory once each way, the weights once a group of windows.
#include "cpu_kernel.h"

#include "forward_cpu.h"

namespace vitkernels::cascaded_group_attention {
namespace VITKERNELS_ISA {
namespace {

size_t weights_size(const Params& p) {
  return p.dtype == DType::f64 ? Weights<double>::size(p) : Weights<float>::size(p);
}
void prepare(const Params& p, void* shared, const Team& all) {
  p.dtype == DType::f64 ? Weights<double>::prepare(p, shared, all) : Weights<float>::prepare(p, shared, all);
}

size_t forward_group_size(const Params& p, int windows) {
  return p.dtype == DType::f64 ? ForwardGroup<double>(p, windows, Scratch(nullptr)).size
                               : ForwardGroup<float>(p, windows, Scratch(nullptr)).size;
}
size_t forward_own_size(const Params& p, int windows) {
  return p.dtype == DType::f64 ? ForwardOwn<double>(p, windows, Scratch(nullptr)).size
                               : ForwardOwn<float>(p, windows, Scratch(nullptr)).size;
}
void forward(const Params& p, const void* shared, void* group, void* own, int64_t first, int count,
             const Team& team) {
  switch (p.dtype) {
    case DType::f64:
      return Forward<double>(p, shared, group, own, first, count, team).run();
    case DType::f32:
      return Forward<float>(p, shared, group, own, first, count, team).run();
    case DType::f16:
      return Forward<f16>(p, shared, group, own, first, count, team).run();
    case DType::bf16:
      return Forward<bf16>(p, shared, group, own, first, count, team).run();
  }
}

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel = {weights_size, prepare, forward_group_size, forward_own_size, forward};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::cascaded_group_attention
