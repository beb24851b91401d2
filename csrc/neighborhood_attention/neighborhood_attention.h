// Neighborhood attention: softmax(scale * q k^T + rpb) v over the keys around each query of a map.
//
// Along an axis of `size` tokens with kernel k and dilation d, token i belongs to group g = i % d, in which
// it is number c = i / d of n = size / d + (g < size % d). It sees the k numbers from
//   clamp(c - k / 2, 0, n - k)                           on an axis that is not causal,
//   max(c - k + 1, 0), and none after c,                 on one that is.
// The queries that see key number c are an interval as well:
//   from c <= k - 1 ? 0 : c - (k - 1 - k / 2)   to   c >= n - k ? n - 1 : c + k / 2     (not causal)
//   from c                                      to   min(c + k - 1, n - 1)              (causal)
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::neighborhood_attention {

// A sequence is a map of height 1, with kernel 1 and dilation 1 along it.
struct Params {
  DType dtype;      // q, k, v, out and their gradients
  DType rpb_dtype;  // rpb and its gradient: dtype, or f32
  int64_t batch;
  int height, width;
  int heads;
  int head_dim;   // d: width of q and k
  int value_dim;  // dv: width of v and out
  int kernel_h, kernel_w;
  int dilation_h, dilation_w;  // kernel * dilation <= height, width
  bool causal_h, causal_w;
  double scale;

  // Strides are (batch, y, x, head, channel); channels lie side by side in all but rpb.
  View q, k, v;  // [batch, height, width, heads, d | dv]
  View rpb;      // [heads, 2 kernel_h - 1, 2 kernel_w - 1], any strides, optional; absent when causal.
                 // Entry (key - query) / dilation + kernel - 1 along each axis.
  View out;      // [batch, height, width, heads, dv]
  View lse;      // [batch, height, width, heads], any strides, f32 (f64 when dtype is f64), natural
                 // logarithm; forward: optional

  // Backward only. grad_out and grad_lse may each be absent (a zero gradient); so may each result.
  View grad_out, grad_lse;
  View grad_q, grad_k, grad_v, grad_rpb;
  void* workspace = nullptr;  // backward_workspace_cuda() bytes

  int entries() const { return (2 * kernel_h - 1) * (2 * kernel_w - 1); }
};

// Launch on the stream; nothing is allocated and nothing synchronises. Throw std::runtime_error when
// the launch is refused.
void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);
int64_t backward_workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::neighborhood_attention
