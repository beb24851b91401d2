// local memory: up to 16 bytes: on sm_80 the gradients of keys and values at 32 channels spill three
// registers between tiles where four blocks share an SM; sm_90 has room.
#include "map.h"
#include "rank_one.h"

namespace vitkernels::strip_attention {

int64_t backward_workspace_cuda(const Params& params) {
  const tile_attention::Problem problem = make_problem(params);
  if (rank_one::applies(params)) return rank_one::backward_workspace(params);
  return with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    return tile_attention::query_rows_workspace<T>(problem, StripMap<T>(params));
  });
}

void backward_cuda(const Params& params, Stream stream) {
  tile_attention::Problem problem = make_problem(params);
  problem.query_rows = params.workspace;
  if (rank_one::applies(params)) return rank_one::backward(params, stream);
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    tile_attention::backward<T>(problem, StripMap<T>(params), stream);
  });
}

}  // namespace vitkernels::strip_attention
