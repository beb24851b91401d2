// Forward: each row sums its tokens, in rising order; sizes are summed on the way.
//
// Floor: (t + t') C elements over the bandwidth. Of the t' rows t' - r or more are copies of one token; the
// indices add 4 bytes a token and 8 a row, and every thread of a row reads them from L1. A row of n tokens
// takes n loads in turn, two in flight, so one destination of half an image is bound by latency, not by
// bandwidth.
#include "token_merge.h"
#include "vitkernels/token_groups.h"

namespace vitkernels::token_merge {

void forward_cuda(const Params& p, Stream stream) {
  using namespace token_groups;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Acc = accumulate_t<T>;
    Gather<T> g{Rows<const T>(p.x), Rows<T>(p.y), Rows<const Acc>(p.size), Rows<Acc>(p.sizes), Scale::none};
    if (p.mode == Mode::wavg) g.scale = Scale::sizes;
    if (p.mode == Mode::mean) g.scale = Scale::count;
    if (p.mode == Mode::amax) {
      gather<true>(Groups(p), g, p.batch, p.channels, stream);
    } else {
      gather<false>(Groups(p), g, p.batch, p.channels, stream);
    }
  });
}

}  // namespace vitkernels::token_merge
