// local memory: up to 16 bytes: in double the gradient of the queries at more than 64 channels takes every
// register, and an address of its geometry is one too many.
#include "map.h"

namespace vitkernels::neighborhood_attention {

int64_t backward_workspace_cuda(const Params& params) {
  return with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    return tile_attention::table_workspace<T>(make_problem(params), NeighborhoodMap<T>(params),
                                              params.grad_rpb);
  });
}

void backward_cuda(const Params& params, Stream stream) {
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    tile_attention::backward_with_table<T>(make_problem(params), NeighborhoodMap<T>(params), params.grad_rpb,
                                           params.workspace, stream);
  });
}

}  // namespace vitkernels::neighborhood_attention
