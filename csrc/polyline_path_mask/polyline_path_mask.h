// Polyline path mask: M[(i,k),(j,l)] = (decays of row i between columns k and l) + (decays of column l
// between rows i and j), for all pairs of tokens of a grid; exp(M); their transposes; and the gradients of
// the decays.
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::polyline_path_mask {

// "accumulate type": f64 when the decays are f64, else f32.
struct Params {
  DType dtype;  // of every tensor
  int64_t batch;
  int heads, height, width;
  bool log, transpose;

  View decay_w, decay_h;  // [B, H, W, heads]
  View mask;              // [B, heads, H W, H W]; forward, dense

  // Backward only. Each gradient may be absent.
  View grad_mask;             // as mask, the last dimension dense
  View grad_w, grad_h;        // [B, H, W, heads]
  void* workspace = nullptr;  // workspace_cuda() bytes

  int64_t planes() const { return batch * heads; }
  int64_t tokens() const { return static_cast<int64_t>(height) * width; }
  // An item of the kernels owns the pairs whose query has this coordinate, row or column; its steps are the
  // other one.
  int owners() const { return transpose ? width : height; }
  int steps() const { return transpose ? height : width; }
};

// Launch on the stream; nothing is allocated and nothing synchronises. Throw std::runtime_error when the
// launch is refused.
void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);
int64_t forward_workspace_cuda(const Params& params);
int64_t backward_workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::polyline_path_mask
