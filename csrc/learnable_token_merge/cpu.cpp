#include <algorithm>
#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::learnable_token_merge {
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

double elements(const Params& p) {
  return static_cast<double>(p.batch) * p.tokens * p.merged_tokens;
}
double products(const Params& p) {
  return 2.0 * elements(p) * (p.width + p.other_width);
}

// Memory of one call: what its passes share, then each thread's scratch.
struct Memory {
  char *shared, *scratch;
  size_t size;  // of a thread's

  Memory(size_t shared_size, size_t scratch_size, int threads) : size(aligned(scratch_size)) {
    shared = static_cast<char*>(thread_scratch(shared_size + size * threads));
    scratch = shared + shared_size;
  }
};

void run(const CpuPass& pass, const Params& p, double work, int threads, const Memory& memory) {
  struct Loop {
    const CpuPass& pass;
    const Params& params;
    const Memory& memory;
  } loop{pass, p, memory};
  const int64_t items = pass.items(p);
  parallel_for(
      items, worthwhile_threads(work, items, threads),
      [](void* context, int64_t begin, int64_t end, int slot) {
        const Loop& l = *static_cast<Loop*>(context);
        l.pass.run(l.params, begin, end, l.memory.scratch + slot * l.memory.size, l.memory.shared);
      },
      &loop);
}

}  // namespace

void forward_cpu(const Params& p, int threads) {
  const CpuPass& pass = kernel().forward;
  run(pass, p, products(p), threads, Memory(0, pass.scratch(p), threads));
}

void backward_cpu(const Params& p, int threads) {
  const CpuKernel& cpu = kernel();
  size_t scratch = 0;
  for (const CpuPass* pass : {&cpu.tokens, &cpu.mask_sums, &cpu.mask_chain})
    scratch = std::max(scratch, pass->scratch(p));
  const Memory memory(p.grad_g ? aligned(cpu.shared(p)) : 0, scratch, threads);
  if (p.grad_z || p.grad_other) run(cpu.tokens, p, products(p), threads, memory);
  if (!p.grad_g) return;
  run(cpu.mask_sums, p, products(p), threads, memory);
  run(cpu.mask_chain, p, 20 * elements(p), threads, memory);
}

}  // namespace vitkernels::learnable_token_merge
