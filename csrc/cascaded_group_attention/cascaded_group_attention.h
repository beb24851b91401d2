// Cascaded group attention: the whole token mixer of EfficientViT, in windows, on affine weights.
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::cascaded_group_attention {

constexpr int kMaxHeads = 16;

struct Params {
  DType dtype;         // x, out, heads and their gradients
  DType weight_dtype;  // the six weights and biases and their gradients: dtype, or f32
  DType table_dtype;   // attn_bias and its gradient: dtype, or f32
  int64_t batch;
  int64_t height, width;
  int channels, num_heads, key_dim;
  int window_h, window_w;
  int kernel_max;  // side of dw_weight
  int kernel_sizes[kMaxHeads];
  double scale;
  bool residual;

  View x, out;                  // [batch, channels, height, width], any strides
  View heads;                   // [windows(), tokens(), channels] before ReLU; forward: optional
  View qkv_weight, qkv_bias;    // [num_heads, qkv_rows(), value_dim()], [num_heads, qkv_rows()]
  View dw_weight, dw_bias;      // [num_heads, key_dim, kernel_max, kernel_max], [num_heads, key_dim]
  View attn_bias;               // [num_heads, tokens()], indexed by |dy| * window_w + |dx|
  View proj_weight, proj_bias;  // [channels, channels], [channels]

  // Backward only. grad_out and grad_heads may each be absent (a zero gradient); so may each result.
  View grad_out, grad_heads;
  View grad_x, grad_qkv_weight, grad_qkv_bias, grad_dw_weight, grad_dw_bias, grad_attn_bias, grad_proj_weight,
      grad_proj_bias;
  void* workspace = nullptr;  // backward_workspace_cuda() bytes; what forward_cuda() asked for

  int tokens() const { return window_h * window_w; }
  int value_dim() const { return channels / num_heads; }
  int qkv_rows() const { return 2 * key_dim + value_dim(); }  // q, k, v
  int64_t window_rows() const { return (height + window_h - 1) / window_h; }
  int64_t window_columns() const { return (width + window_w - 1) / window_w; }
  int64_t windows() const { return batch * window_rows() * window_columns(); }  // by (image, row, column)
  int dead_taps(int head) const { return (kernel_max - kernel_sizes[head]) / 2; }
};

// Launch on the stream; nothing is allocated and nothing synchronises. Throw std::runtime_error when
// the launch is refused. The forward seldom needs a workspace (windows too large for shared memory): where it
// does and has none, it returns the bytes that it lacks and has done nothing; else 0.
int64_t forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);
int64_t backward_workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::cascaded_group_attention
