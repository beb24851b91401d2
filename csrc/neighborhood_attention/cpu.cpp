#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::neighborhood_attention {
namespace {

const CpuKernel& kernel(const Params& p) {
  const bool dense = is_dense(p);
#ifdef VITKERNELS_X86_ISAS
  if (selected_isa() == Isa::avx512) return dense ? avx512::kDense : avx512::kShifted;
  if (selected_isa() == Isa::avx2) return dense ? avx2::kDense : avx2::kShifted;
#endif
  return dense ? baseline::kDense : baseline::kShifted;
}

size_t aligned(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

double products(const Params& p) {
  return 2.0 * p.batch * p.height * p.width * p.heads * p.kernel_h * p.kernel_w * (p.head_dim + p.value_dim);
}

struct Loop {
  const Params& params;
  const CpuKernel& kernel;
  char* scratch;
  size_t scratch_size;
  void* partials;
};

}  // namespace

void forward_cpu(const Params& p, int threads) {
  const CpuKernel& cpu = kernel(p);
  const int64_t items = cpu.forward_items(p);
  threads = worthwhile_threads(products(p), items, threads);
  const size_t size = aligned(cpu.forward_scratch(p));
  Loop loop{p, cpu, static_cast<char*>(thread_scratch(size * threads)), size, nullptr};
  parallel_for(
      items, threads,
      [](void* context, int64_t begin, int64_t end, int slot) {
        const Loop& l = *static_cast<Loop*>(context);
        l.kernel.forward(l.params, begin, end, l.scratch + slot * l.scratch_size);
      },
      &loop);
}

void backward_cpu(const Params& p, int threads) {
  const CpuKernel& cpu = kernel(p);
  const int64_t items = cpu.backward_items(p);
  threads = worthwhile_threads(2.5 * products(p), items, threads);
  const size_t partials = p.grad_rpb ? aligned(cpu.partials_size(p)) : 0;
  const size_t size = aligned(cpu.backward_scratch(p));
  char* memory = static_cast<char*>(thread_scratch(partials + size * threads));
  Loop loop{p, cpu, memory + partials, size, memory};
  parallel_for(
      items, threads,
      [](void* context, int64_t begin, int64_t end, int slot) {
        const Loop& l = *static_cast<Loop*>(context);
        l.kernel.backward(l.params, begin, end, l.scratch + slot * l.scratch_size, l.partials);
      },
      &loop);
  if (p.grad_rpb) cpu.reduce_partials(p, memory);
}

}  // namespace vitkernels::neighborhood_attention
