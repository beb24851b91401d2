#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::strip_attention {
namespace {

struct Kernels {
  const Forward& forward;
  const Backward& backward;
};

Kernels kernels() {
#ifdef VITKERNELS_X86_ISAS
  if (selected_isa() == Isa::avx512) return {avx512::kForward, avx512::kBackward};
  if (selected_isa() == Isa::avx2) return {avx2::kForward, avx2::kBackward};
#endif
  return {baseline::kForward, baseline::kBackward};
}

size_t aligned(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// FLOPs of the products, an exponential counted as twenty.
double work(const Params& p) {
  return static_cast<double>(p.batch) * p.heads * p.queries * p.keys * (2.0 * (p.key_dim + p.value_dim) + 20);
}

}  // namespace

void forward_cpu(const Params& p, int threads) {
  struct Loop {
    const Params& params;
    const Forward& cpu;
    char* scratch;
    size_t size;
  };
  const Forward& cpu = kernels().forward;
  const int64_t items = cpu.items(p);
  threads = worthwhile_threads(work(p), items, threads);
  const size_t size = aligned(cpu.scratch(p));
  Loop loop{p, cpu, static_cast<char*>(thread_scratch(size * threads)), size};
  parallel_for(
      items, threads,
      [](void* context, int64_t begin, int64_t end, int slot) {
        const Loop& l = *static_cast<Loop*>(context);
        l.cpu.run(l.params, begin, end, l.scratch + slot * l.size);
      },
      &loop, worthwhile_chunk(work(p), items, threads));
}

void backward_cpu(const Params& p, int threads) {
  struct Loop {
    const Params& params;
    const Backward& cpu;
    char *partials, *scratch;
    size_t size;
  };
  const Backward& cpu = kernels().backward;
  const int64_t items = cpu.items(p);
  const size_t partials = aligned(cpu.partials(p)), size = aligned(cpu.scratch(p));
  const int used = worthwhile_threads(2 * work(p), items, threads);
  char* memory = static_cast<char*>(thread_scratch(partials + size * used));
  Loop loop{p, cpu, memory, memory + partials, size};
  parallel_for(
      items, used,
      [](void* context, int64_t begin, int64_t end, int slot) {
        const Loop& l = *static_cast<Loop*>(context);
        l.cpu.run(l.params, begin, end, l.scratch + slot * l.size, l.partials);
      },
      &loop, worthwhile_chunk(2 * work(p), items, used));
  if (partials == 0) return;
  const int64_t reductions = cpu.reduce_items(p);
  parallel_for(
      reductions, worthwhile_threads(partials / sizeof(float), reductions, threads),
      [](void* context, int64_t begin, int64_t end, int) {
        const Loop& l = *static_cast<Loop*>(context);
        l.cpu.reduce(l.params, begin, end, l.partials);
      },
      &loop);
}

}  // namespace vitkernels::strip_attention
