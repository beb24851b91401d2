#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/token_rows.h"

namespace vitkernels::token_merge {
namespace {

const CpuKernel& kernel() {
#ifdef VITKERNELS_X86_ISAS
  if (selected_isa() == Isa::avx512) return avx512::kKernel;
  if (selected_isa() == Isa::avx2) return avx2::kKernel;
#endif
  return baseline::kKernel;
}

}  // namespace

void forward_cpu(const Params& p, int threads) {
  over_token_rows(p, kernel().forward, p.batch * p.merged_tokens, threads);
}

void backward_cpu(const Params& p, int threads) {
  const bool groups = p.mode == Mode::amax;
  over_token_rows(p, kernel().backward, p.batch * (groups ? p.merged_tokens : p.tokens), threads);
}

}  // namespace vitkernels::token_merge
