// Residual FFN: u = x + dw3x3(x) + dw_bias (u = x without dw_weight),
// out = u + scale2 * (weight2 relu(scale1 * (weight1 u) + bias1)) + bias2, at every position of a map.
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::residual_ffn {

struct Params {
  DType dtype;         // x, out, weight1, weight2
  DType vector_dtype;  // dw_*, scale*, bias*: dtype, or f32
  int64_t batch;
  int channels, hidden, height, width;

  View x, out;         // [batch, channels, height, width], any strides; on the CPU one for all steps of a
                       // position, which stands in place of the rows'
  View weight1;        // [hidden, channels], any strides
  View weight2;        // [channels, hidden], any strides
  View bias1, scale1;  // [hidden]; a scale may be absent, which is 1
  View bias2, scale2;  // [channels]
  View dw_weight;      // [channels, 3, 3], zero padding around the map; optional
  View dw_bias;        // [channels], with dw_weight

  void* workspace = nullptr;  // CUDA: forward_workspace_cuda() bytes
};

// Launch on the stream; nothing is allocated and nothing synchronises. Throws std::runtime_error when a
// launch is refused.
void forward_cuda(const Params& params, Stream stream);
int64_t forward_workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);

}  // namespace vitkernels::residual_ffn
