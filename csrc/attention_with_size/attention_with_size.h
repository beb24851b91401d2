// Proportional attention: softmax(scale * q k^T + log(size)) v, one size per (batch, key), all heads sharing
// it.
//
// exp(s + log z) = z exp(s), so a kernel may add the logarithm to the logit (one per key and tile, taken
// once) or weigh the exponential; the maximum that it subtracts is only a guard and may be that of either. A
// size of 0 hides its key (its logit is -inf); a query whose keys are all hidden is NaN.
//
// Backward, from lse, with g = grad_out and P = size exp(S - lse), S = scale q k^T:
//   delta_n = <g_n, out_n> - grad_lse_n        grad_v_m = sum_n P[n, m] g_n
//   dS[n, m] = P[n, m] (<g_n, v_m> - delta_n)  grad_q = scale dS k, grad_k = scale dS^T q
// Sizes have no gradient.
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::attention_with_size {

struct Params {
  DType dtype;  // q, k, v, out and their gradients
  int64_t batch;
  int heads;
  int64_t queries, keys;   // N >= 1, M >= 1
  int key_dim, value_dim;  // d, dv
  double scale;

  // Strides are (batch, head, token, channel); channels lie side by side.
  View q, k, v, out;
  View size;  // [batch, M], any strides, f32 (f64 when dtype is f64)
  View lse;   // [batch, heads, N], any strides, f32 (f64 when dtype is f64), natural logarithm; forward:
              // optional

  // Backward only. grad_out and grad_lse may each be absent (a zero gradient); so may each result.
  View grad_out, grad_lse;
  View grad_q, grad_k, grad_v;
  void* workspace = nullptr;  // backward_workspace_cuda() bytes
};

void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);
int64_t backward_workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::attention_with_size
