#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::kan_linear {
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

double product(const Params& p) {
  return 2.0 * p.rows * p.depth() * p.outputs;
}

struct Loop {
  const Params& params;
  const CpuKernel& kernel;
  Cut cut;
  char* scratch;
  size_t scratch_size;
  void* shared;
};

}  // namespace

void forward_cpu(const Params& p, int threads) {
  const CpuKernel& cpu = kernel();
  threads = worthwhile_threads(product(p), p.rows * p.outputs, threads);
  const Cut cut = cpu.cut(p, threads);
  const size_t size = aligned(cpu.forward_scratch(p, cut));
  Loop loop{p, cpu, cut, static_cast<char*>(thread_scratch(size * threads)), size, nullptr};
  parallel_for(
      cut.row_blocks * cut.segments, threads,
      [](void* context, int64_t begin, int64_t end, int slot) {
        const Loop& l = *static_cast<Loop*>(context);
        l.kernel.forward(l.params, l.cut, begin, end, l.scratch + slot * l.scratch_size);
      },
      &loop);
}

void backward_cpu(const Params& p, int threads) {
  const CpuKernel& cpu = kernel();
  threads = worthwhile_threads(2 * product(p), p.channels, threads);
  const Cut cut = cpu.cut(p, threads);
  const size_t shared = aligned(cpu.shared_size(p));
  const size_t size = aligned(cpu.backward_scratch(p, cut));
  char* memory = static_cast<char*>(thread_scratch(shared + size * threads));
  Loop loop{p, cpu, cut, memory + shared, size, memory};
  parallel_for((p.channels + cut.channels - 1) / cut.channels, threads,
               [](void* context, int64_t begin, int64_t end, int slot) {
                 const Loop& l = *static_cast<Loop*>(context);
                 l.kernel.backward(l.params, l.cut, begin, end, l.scratch + slot * l.scratch_size, l.shared);
               },
               &loop);
  if (p.grad_x)
    parallel_for(
        p.rows, threads,
        [](void* context, int64_t begin, int64_t end, int) {
          const Loop& l = *static_cast<Loop*>(context);
          l.kernel.backward_rows(l.params, begin, end, l.shared);
        },
        &loop);
  if (p.grad_grid) cpu.backward_grid(p, memory);
}

}  // namespace vitkernels::kan_linear
