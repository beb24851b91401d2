// Bipartite matching: each even token's best odd token by cosine, and the r even tokens with the best ones.
//
//   score[a, b] = <m[2a], m[2b + 1]> / (|m[2a]| |m[2b + 1]|), a norm of 0 counting as 1; NaN counts as -2
//   best[a]     = max_b score[a, b], at the lowest such b; with a distill token b = 0 is left out
//   merged      = the r a of the highest best, equal ones by rising a; with a class token a = 0 is left out
//   kept        = the other a: rising with a class token, else in the order of the same ranking
//
// Rows of the merged sequence, n = ceil(t / 2) - r even tokens being kept: kept[j] -> j, odd token b -> n +
// b; with a distill token kept[0] -> 0, b = 0 -> 1, kept[j] -> j + 1, b -> n + b. A merged token goes to its
// odd token's row.
//
// Floor: 2 ceil(t / 2) floor(t / 2) c FLOPs an image, one reading of the metric, 12 t + 4 r bytes written.
// Scores live in registers: a running maximum and its b per row. The norm of an even token only scales its
// row, so it is applied to the maximum. Products of fp16 and bf16 tokens are exact in the matrix unit; norms
// are fp32, as is the division. Ranking is by (best, a), a total order in which no two are equal, so that any
// method gives the same result. The CSR follows: a row's members are its odd token and the merged tokens that
// chose it, in rising order.
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::bipartite_match {

struct Params {
  DType dtype;  // metric
  int64_t batch;
  int64_t tokens;  // t >= 2
  int channels;    // c >= 1
  int64_t merged;  // r: 1 .. (t - protected) / 2
  bool class_token, distill_token;

  View metric;  // [batch, t, c], channels side by side; token strides of any size

  // int32, contiguous; written entirely.
  View rows;      // [batch, t]
  View starts;    // [batch, t - r + 1]
  View members;   // [batch, t]: rising within a row
  View src, dst;  // [batch, r]: tokens (2a and 2b + 1), the best pair first

  void* workspace = nullptr;  // workspace_cuda() bytes: best and its b, where a block cannot hold an image
};

void forward_cuda(const Params& params, Stream stream);
int64_t workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);

}  // namespace vitkernels::bipartite_match
