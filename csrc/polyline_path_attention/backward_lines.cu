// local memory: up to 8 bytes: four blocks of an SM leave a thread of the queries' kernel 128 registers, two
// too few on sm_80 and none on sm_90.
#include "backward.h"

namespace vitkernels::polyline_path_attention {

int line_rows(const Params& params) {
  return backward_rows<false>(params);
}

void backward_lines(DType dtype, Own own, int rows, const BackwardCall& call, Stream stream) {
  backward_of<false>(dtype, own, rows, call, stream);
}

}  // namespace vitkernels::polyline_path_attention
