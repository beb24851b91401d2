// Strip attention: softmax(scale * q k^T + bias) v of N queries and M keys, per (batch, head). q and k have r
// channels, v has dv. With r = 1 and no bias the logits of query n are scale q_n k_m, and the largest of them
// is scale q_n kmax where scale q_n >= 0, else scale q_n kmin: no running maximum.
//
// Backward, from lse, with g = grad_out and P = exp(S - lse):
//   delta_n = <g_n, out_n> - grad_lse_n        grad_v_m = sum_n P[n, m] g_n
//   dS[n, m] = P[n, m] (<g_n, v_m> - delta_n)  the gradient of the bias, before it is folded to its shape
//   grad_q_n = scale sum_m dS[n, m] k_m        grad_k_m = scale sum_n dS[n, m] q_n
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::strip_attention {

struct Params {
  DType dtype;            // q, k, v, out and their gradients
  DType bias_dtype;       // bias: dtype, or f32
  DType grad_bias_dtype;  // grad_bias: bias_dtype, or f32 (f64 when dtype is f64)
  int64_t batch;
  int heads;
  int64_t queries, keys;  // N >= 1, M >= 1
  int key_dim;            // r: width of q and k
  int value_dim;          // dv: width of v and out
  double scale;

  // Strides are (batch, head, token, channel); channels lie side by side (where there is one alone, its
  // stride means nothing). Token strides need be neither r nor dv, and none is aligned to more than an
  // element.
  View q, k, v;
  View bias;  // [batch, heads, N, M], any strides, 0 along what it is broadcast over; optional
  View out;
  View lse;  // [batch, heads, N], any strides, f32 (f64 when dtype is f64), natural logarithm;
             // forward: optional

  // Backward only. grad_out and grad_lse may each be absent (a zero gradient); so may each result.
  View grad_out, grad_lse;
  View grad_q, grad_k, grad_v;
  View grad_bias;             // dS: [batch, heads, N, M], any strides, each entry of its own
  void* workspace = nullptr;  // backward_workspace_cuda() bytes
};

// Launch on the stream; nothing is allocated and nothing synchronises. Throw std::runtime_error when
// the launch is refused.
void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);
int64_t backward_workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::strip_attention
