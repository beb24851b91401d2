// local memory: up to 64 bytes: three blocks of an SM leave a thread 168 registers, and the kernels of the
// keys and values spill one of them between tiles on sm_90, fourteen on sm_80. On an H200 two blocks without
// a spill had 12 % of the SM's warps, and the backward took 1.2 times as long.
#include "map.h"

namespace vitkernels::attention_with_size {

int64_t backward_workspace_cuda(const Params&) {
  return 0;
}

void backward_cuda(const Params& params, Stream stream) {
  const tile_attention::Problem problem = make_problem(params);
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    tile_attention::backward<T>(problem, SizeMap<T>(params), stream);
  });
}

}  // namespace vitkernels::attention_with_size
