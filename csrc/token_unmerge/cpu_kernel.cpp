// Unmerging on one core, one instruction set. Floor: y read once, x written once; it only moves bytes.
#include "cpu_kernel.h"

#include "vitkernels/token_groups_cpu.h"

namespace vitkernels::token_unmerge {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

namespace {

void forward(const Params& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto element) {
    using E = decltype(element);
    const int32_t* rows = static_cast<const int32_t*>(p.rows.data);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.tokens;
      copy_row(static_cast<E*>(p.x.data) + item * p.channels,
               static_cast<const E*>(p.y.data) + b * p.y.stride[0] + rows[item] * p.y.stride[1], p.channels);
    }
  });
}

void backward(const Params& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.merged_tokens, g = item % p.merged_tokens;
      const int32_t* starts = static_cast<const int32_t*>(p.starts.data) + b * (p.merged_tokens + 1) + g;
      const int32_t* members = static_cast<const int32_t*>(p.members.data) + b * p.tokens + starts[0];
      E* to = static_cast<E*>(p.grad_y.data) + b * p.grad_y.stride[0] + g * p.grad_y.stride[1];
      const E* from = static_cast<const E*>(p.grad_x.data) + b * p.grad_x.stride[0];
      const int count = starts[1] - starts[0];
      if (count == 1)
        copy_row(to, from + members[0] * p.grad_x.stride[1], p.channels);
      else
        sum_rows(to, from, p.grad_x.stride[1], members, count, p.channels);
    }
  });
}

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel = {forward, backward};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::token_unmerge
