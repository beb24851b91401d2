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
