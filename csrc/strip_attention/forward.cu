#include "map.h"
#include "rank_one.h"
#include "vitkernels/tile_attention_forward.h"

namespace vitkernels::strip_attention {

void forward_cuda(const Params& params, Stream stream) {
  const tile_attention::Problem problem = make_problem(params);
  if (rank_one::applies(params)) return rank_one::forward(params, stream);
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    tile_attention::forward<T>(problem, StripMap<T>(params), stream);
  });
}

}  // namespace vitkernels::strip_attention
