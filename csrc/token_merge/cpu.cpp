#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/fresh_memory.h"
#include "vitkernels/parallel.h"

namespace vitkernels::token_merge {
namespace {

const CpuKernel& kernel() {
#ifdef VITKERNELS_X86_ISAS
  if (selected_isa() == Isa::avx512) return avx512::kKernel;
  if (selected_isa() == Isa::avx2) return avx2::kKernel;
#endif
  return baseline::kKernel;
}

struct Loop {
  const Params& params;
  void (*run)(const Params&, int64_t begin, int64_t end);
};

void run(const Params& p, void (*fn)(const Params&, int64_t, int64_t), int64_t items, int threads) {
  Loop loop{p, fn};
  const double elements = static_cast<double>(p.batch) * p.tokens * p.channels;
  parallel_for(
      items, worthwhile_threads(4 * elements, items, threads),
      [](void* context, int64_t begin, int64_t end, int) {
        const Loop& l = *static_cast<Loop*>(context);
        l.run(l.params, begin, end);
      },
      &loop);
}

void expect(const Params& p, const View& result, int64_t tokens) {
  if (result.stride[1] != p.channels || result.stride[0] != tokens * p.channels)
    return;  // not a block of memory
  const size_t element = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
  expect_large_result(result.data, static_cast<size_t>(p.batch * tokens * p.channels) * element);
}

}  // namespace

void forward_cpu(const Params& p, int threads) {
  expect(p, p.y, p.merged_tokens);
  run(p, kernel().forward, p.batch * p.merged_tokens, threads);
}

void backward_cpu(const Params& p, int threads) {
  expect(p, p.grad_x, p.tokens);
  const bool groups = p.mode == Mode::amax;
  run(p, kernel().backward, p.batch * (groups ? p.merged_tokens : p.tokens), threads);
}

}  // namespace vitkernels::token_merge
