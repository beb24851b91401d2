// The product y = L x of a polyline path mask and values, as two one-dimensional products by recurrences, and
// its gradients.
//
// Along one axis, with decays a: f_i = x_i + a_i f_(i-1), r_i = x_i + a_(i+1) r_(i+1), y = f + r - x. The
// product is symmetric, so its gradient is itself: dx_i = lambda_i + mu_i - dy_i with mu and lambda the f and
// r of dy. And d log a_i = a_i * sum over channels of (lambda_i f_(i-1) + mu_(i-1) r_i).
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::polyline_path_scan {

enum class Axis : int { rows = 0, columns = 1 };

// Tokens and gradients of them: [B, H, W, heads, head_dim]. Decays: [B, H, W, heads].
struct Params {
  DType dtype;        // of x, y and their gradients
  DType decay_dtype;  // of the decays and their gradients: dtype, or f32
  int64_t batch;
  int heads, height, width, head_dim;
  bool transpose;

  View x;
  View decay_w, decay_h;
  View y;  // forward

  // Backward only. Each gradient may be absent; x_buffer, in which the gradient of x is made, may not.
  View grad_y;
  View buffer;
  View grad_w, grad_h;
  bool wants_x;  // otherwise what is left in the buffer means nothing

  int64_t planes() const { return batch * heads; }
  // The axis along which the first product goes, or the second.
  Axis axis(int which) const { return (which == 0) == transpose ? Axis::rows : Axis::columns; }
  int length(Axis axis) const { return axis == Axis::rows ? width : height; }
  int lines(Axis axis) const { return axis == Axis::rows ? height : width; }
  const View& decay(Axis axis) const { return axis == Axis::rows ? decay_w : decay_h; }
  const View& grad_decay(Axis axis) const { return axis == Axis::rows ? grad_w : grad_h; }
};

// Launch on the stream; nothing is allocated and nothing synchronises. Throw std::runtime_error when the
// launch is refused.
void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);

// Tokens have dense channels.
void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::polyline_path_scan
