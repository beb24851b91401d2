#include "map.h"

namespace vitkernels::attention_with_size {

int64_t backward_workspace_cuda(const Params& params) {
  const tile_attention::Problem problem = make_problem(params);
  return with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    return tile_attention::query_rows_workspace<T>(problem, SizeMap<T>(params));
  });
}

void backward_cuda(const Params& params, Stream stream) {
  tile_attention::Problem problem = make_problem(params);
  problem.query_rows = params.workspace;
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    tile_attention::backward<T>(problem, SizeMap<T>(params), stream);
  });
}

}  // namespace vitkernels::attention_with_size
