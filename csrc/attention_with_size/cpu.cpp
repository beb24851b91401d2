#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::attention_with_size {
namespace {

struct Kernels {
  const CpuKernel& forward;
  const CpuKernel& backward;
};

Kernels kernels() {
#ifdef VITKERNELS_X86_ISAS
  if (selected_isa() == Isa::avx512) return {avx512::kForward, avx512::kBackward};
  if (selected_isa() == Isa::avx2) return {avx2::kForward, avx2::kBackward};
#endif
  return {baseline::kForward, baseline::kBackward};
}

// FLOPs of the products, an exponential counted as twenty.
double work(const Params& p) {
  return static_cast<double>(p.batch) * p.heads * p.queries * p.keys * (2.0 * (p.key_dim + p.value_dim) + 20);
}

void run(const CpuKernel& cpu, const Params& p, double work, int threads) {
  struct Loop {
    const CpuKernel& cpu;
    const Params& params;
    char* scratch;
    size_t size;
  };
  const int64_t items = cpu.items(p);
  threads = worthwhile_threads(work, items, threads);
  const size_t size = (cpu.scratch(p) + 63) / 64 * 64;
  Loop loop{cpu, p, static_cast<char*>(thread_scratch(size * threads)), size};
  parallel_for(
      items, threads,
      [](void* context, int64_t begin, int64_t end, int slot) {
        const Loop& l = *static_cast<Loop*>(context);
        l.cpu.run(l.params, begin, end, l.scratch + slot * l.size);
      },
      &loop);
}

}  // namespace

void forward_cpu(const Params& p, int threads) {
  run(kernels().forward, p, work(p), threads);
}

void backward_cpu(const Params& p, int threads) {
  run(kernels().backward, p, 2.5 * work(p), threads);
}

}  // namespace vitkernels::attention_with_size
