// Backward: each row sums the gradients of its tokens. One reading of grad_x, one writing of grad_y.
#include "token_unmerge.h"
#include "vitkernels/token_groups.h"

namespace vitkernels::token_unmerge {

void backward_cuda(const Params& p, Stream stream) {
  using namespace token_groups;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Acc = accumulate_t<T>;
    const Gather<T> g{Rows<const T>(p.grad_x), Rows<T>(p.grad_y), Rows<const Acc>(View()), Rows<Acc>(View()),
                      Scale::none};
    gather<false>(Groups(p), g, p.batch, p.channels, stream);
  });
}

}  // namespace vitkernels::token_unmerge
