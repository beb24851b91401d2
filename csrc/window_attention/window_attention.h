// Window attention: softmax(scale * q k^T + bias) v inside windows of window_h * window_w tokens.
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::window_attention {

struct Params {
  DType dtype;       // q, k, v, out and their gradients
  DType bias_dtype;  // bias_table and its gradient: dtype, or f32
  int64_t batch;
  int64_t heads;
  int window_h;
  int window_w;
  int head_dim;      // d: width of q and k
  int value_dim;     // dv: width of v and out
  bool signed_bias;  // table indexed by (dy, dx) rather than (|dy|, |dx|)
  double scale;

  View q, k, v;     // [batch, heads, tokens, d | dv], any strides
  View bias_table;  // [heads, entries()], optional
  View out;         // [batch, heads, tokens, dv], any strides
  View lse;  // [batch, heads, tokens] f32 (f64 when dtype is f64), natural logarithm; forward: optional

  // Backward only. grad_out and grad_lse may each be absent (a zero gradient); so may each result.
  View grad_out, grad_lse;
  View grad_q, grad_k, grad_v, grad_bias_table;
  void* workspace = nullptr;  // backward_workspace_cuda() bytes

  int tokens() const { return window_h * window_w; }
  int entries() const { return signed_bias ? (2 * window_h - 1) * (2 * window_w - 1) : window_h * window_w; }
};

// Launch on the stream; nothing is allocated and nothing synchronises. Throw std::runtime_error when
// the launch is refused.
void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);
int64_t backward_workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::window_attention
