#include "backward.h"

namespace vitkernels::polyline_path_attention {

int whole_rows(const Params& params) {
  return backward_rows<true>(params);
}

void backward_whole(DType dtype, Own own, int rows, const BackwardCall& call, Stream stream) {
  backward_of<true>(dtype, own, rows, call, stream);
}

}  // namespace vitkernels::polyline_path_attention
