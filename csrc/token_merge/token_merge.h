// Token merging: row g of the result is made of the tokens members[starts[g] .. starts[g + 1]).
//
//   S[g] = sum_i size[i]
//   y[g] = sum_i size[i] x[i] / S[g]   wavg        (weights of 1 without sizes)
//          sum_i x[i]                  sum
//          sum_i x[i] / n[g]           mean        (n[g] = starts[g + 1] - starts[g])
//          max_i x[i]                  amax
// Backward, each token reading the row of its group (rows[i] = g):
//   dx[i] = size[i] / S[g] dy[g],  dy[g],  dy[g] / n[g],  (x[i] == y[g]) dy[g] / |{j in g: x[j] == y[g]}|
//
// Both directions gather, so neither needs atomics: forward a warp (or a vector loop) owns a row of y and
// runs over its members in rising order, fp32 sums; backward it owns a token. With amax it owns a group in
// both directions, because the share depends on all of its members; each token is in one group, so nothing is
// written twice. Groups are mostly of one token, one of them may hold half of the sequence: rows are
// independent, so a long one costs its own length only. Floor: x read once, y written once. Every member is
// read by one owner.
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::token_merge {

enum class Mode : int { wavg = 0, sum = 1, mean = 2, amax = 3 };

struct Params {
  DType dtype;  // x, y and their gradients; sizes are f32 (f64 when dtype is f64)
  Mode mode;
  int64_t batch;
  int64_t tokens, merged_tokens;  // t >= t' >= 1
  int64_t channels;

  View x;                      // [batch, t, C], channels side by side; backward: for amax alone
  View size;                   // [batch, t], any strides; optional: ones
  View rows, starts, members;  // int32, contiguous: [batch, t], [batch, t' + 1], [batch, t]
  View y;                      // [batch, t', C], contiguous; backward: for amax alone
  View sizes;                  // S: [batch, t'], contiguous; backward reads it for wavg

  // Backward only. An absent grad_y is for the caller to turn into zeros.
  View grad_y;  // [batch, t', C], channels side by side
  View grad_x;  // [batch, t, C], channels side by side
};

void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::token_merge
