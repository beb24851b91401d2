#include "map.h"

namespace vitkernels::window_attention {

void forward_cuda(const Params& params, Stream stream) {
  const tile_attention::Problem problem = make_problem(params);
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    tile_attention::forward<T>(problem, WindowMap<T>(params), stream);
  });
}

}  // namespace vitkernels::window_attention
