#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::window_attention {
namespace {

const CpuKernel& kernel() {
#ifdef VITKERNELS_X86_ISAS
  if (selected_isa() == Isa::avx512) return avx512::kKernel;
  if (selected_isa() == Isa::avx2) return avx2::kKernel;
#endif
  return baseline::kKernel;
}

size_t aligned(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

double products(const Params& p) {
  return 2.0 * p.batch * p.heads * p.tokens() * p.tokens() * (p.head_dim + p.value_dim);
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
  const CpuKernel& cpu = kernel();
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
  const CpuKernel& cpu = kernel();
  const int64_t items = cpu.backward_items(p);
  threads = worthwhile_threads(2.5 * products(p), items, threads);
  const size_t partials = p.grad_bias_table ? aligned(cpu.partials_size(p)) : 0;
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
  if (p.grad_bias_table) cpu.reduce_partials(p, memory);
}

}  // namespace vitkernels::window_attention
