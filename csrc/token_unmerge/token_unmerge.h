// Unmerging: x[i] = y[rows[i]]. Backward: dy[g] = sum of dx[i] over members[starts[g] .. starts[g + 1]), in
// rising order, in fp32 (fp64): the transpose, and token_merge in mode sum. The inner loops are those of
// vitkernels/token_groups.h, which both operators share. Floor: y read once, x written once.
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::token_unmerge {

struct Params {
  DType dtype;
  int64_t batch;
  int64_t tokens, merged_tokens;  // t >= t' >= 1
  int64_t channels;

  View rows, starts, members;  // int32, contiguous: [batch, t], [batch, t' + 1], [batch, t]

  View y;  // [batch, t', C], channels side by side; forward only
  View x;  // [batch, t, C], contiguous; forward only

  View grad_x;  // [batch, t, C], channels side by side; backward only
  View grad_y;  // [batch, t', C], channels side by side; backward only
};

void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::token_unmerge
