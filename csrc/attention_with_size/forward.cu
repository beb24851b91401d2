#include "map.h"
#include "vitkernels/tile_attention_forward.h"

namespace vitkernels::attention_with_size {

void forward_cuda(const Params& params, Stream stream) {
  const tile_attention::Problem problem = make_problem(params);
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    tile_attention::forward<T>(problem, SizeMap<T>(params), stream);
  });
}

}  // namespace vitkernels::attention_with_size
