#include "backward.h"

namespace vitkernels::polyline_path_attention {

int line_rows(const Params& params) {
  return backward_rows<false>(params);
}

void backward_lines(DType dtype, Own own, int rows, const BackwardCall& call, Stream stream) {
  backward_of<false>(dtype, own, rows, call, stream);
}

}  // namespace vitkernels::polyline_path_attention
