#include "map.h"

namespace vitkernels::window_attention {

int64_t backward_workspace_cuda(const Params& params) {
  return with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    return tile_attention::table_workspace<T>(make_problem(params), WindowMap<T>(params),
                                              params.grad_bias_table);
  });
}

void backward_cuda(const Params& params, Stream stream) {
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    tile_attention::backward_with_table<T>(make_problem(params), WindowMap<T>(params), params.grad_bias_table,
                                           params.workspace, stream);
  });
}

}  // namespace vitkernels::window_attention
