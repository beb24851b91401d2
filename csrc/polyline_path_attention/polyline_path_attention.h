// Polyline path masked attention on maps.
//
// Rows i, r and columns j, l. With the sums Cw of log_decay_w along each row and Ch of log_decay_h
// down each column, by the order of the indices alone:
//   T_i[j, l] = Cw[i, max(j, l)] - Cw[i, min(j, l)]      h_ir[l] = Ch[max(i, r), l] - Ch[min(i, r), l]
//   M[(i, j), (r, l)] = T_i[j, l] + h_ir[l]              M^T[(i, j), (r, l)] = T_r[j, l] + h_ir[j]
// whole:        out = 1/2 softmax(S + M) v + 1/2 softmax(S + M^T) v
// criss-cross:  out = 1/2 A_h (A_w v) + 1/2 A_w (A_h v), A_w = softmax(S + T) in rows, A_h = softmax(S + h)
//               in columns
// vitkernels/kernels/polyline_path_attention/native.py says what is saved and how gradients are defined.
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::polyline_path_attention {

struct Params {
  DType dtype;        // q, k, v, out, partial and the gradients of q, k, v
  DType decay_dtype;  // log decays and their gradients: dtype, or f32
  int64_t batch;
  int height, width;
  int heads;
  int head_dim;   // d: width of q and k
  int value_dim;  // dv: width of v and out
  bool criss_cross;
  double scale;

  // Strides are (batch, y, x, head, channel); channels lie side by side.
  View q, k, v;                   // [batch, height, width, heads, d | dv]
  View log_decay_w, log_decay_h;  // [batch, height, width, heads], any strides, zero too
  View out;                       // [batch, height, width, heads, dv], contiguous
  // By-products, contiguous; forward: each may be absent where the backend skips by-products.
  View lse;      // [2, batch, heads, height, width], f32 (f64 when dtype is f64)
  View cum;      // as lse
  View partial;  // [P, batch, height, width, heads * dv]

  // Backward only; each gradient may be absent, grad_out may not.
  View grad_out;  // [batch, height, width, heads, dv], any strides but dense channels
  View grad_q, grad_k, grad_v, grad_log_decay_w, grad_log_decay_h;
  void* workspace = nullptr;  // backward_workspace_cuda() bytes
};

// Launch on the stream; nothing is allocated and nothing synchronises. Throw std::runtime_error when
// the launch is refused.
void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);
int64_t backward_workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::polyline_path_attention
