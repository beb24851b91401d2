// local memory: up to 8 bytes: three blocks of an SM leave a thread 168 registers, and the kernel of the keys and
// values spills one of them between tiles; two blocks without a spill had 12 % of the SM's warps.
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
