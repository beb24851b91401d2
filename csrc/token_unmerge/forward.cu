// Forward: each token reads the row of its group. One reading of y (again from L2, for the tokens that share
// a row) and one writing of x.
#include "token_unmerge.h"
#include "vitkernels/token_groups.h"

namespace vitkernels::token_unmerge {

void forward_cuda(const Params& p, Stream stream) {
  using namespace token_groups;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Acc = accumulate_t<T>;
    const Rows<const Acc> absent{View()};
    const Spread<T> s{Rows<const T>(p.y), Rows<T>(p.x), absent, absent, Scale::none};
    spread(Groups(p), s, p.batch, p.channels, stream);
  });
}

}  // namespace vitkernels::token_unmerge
