// FasterKAN layer: y = Phi W^T with phi_cm = 1 - tanh^2((u_c - grid_m) * inv_denominator), u = layer_norm(x).
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::kan_linear {

// "accumulate type": f64 when x is f64, else f32. Matrices have dense rows, vectors are dense.
struct Params {
  DType x_dtype;       // x and grad_x
  DType weight_dtype;  // weight, y and their gradients: x_dtype, or f16 or bf16 beside an f32 x
  DType ln_weight_dtype, ln_bias_dtype, grid_dtype;  // of the CUDA kernels: x_dtype or f32
  int64_t rows;
  int channels;  // I
  int grids;     // G
  int outputs;   // J
  double inv_denominator;
  double eps;

  View x;                         // [rows, I]
  View weight;                    // [J, I * G], the grid fastest
  View ln_weight, ln_bias, grid;  // [I], [I], [G]; for the CPU in the accumulate type
  View y;                         // [rows, J]
  View mean, rstd;                // [rows], accumulate type; forward: optional

  // Backward only. Each gradient may be absent. Those of ln_weight, ln_bias and grid are as these.
  View grad_y;  // [rows, J]
  View grad_x, grad_weight, grad_ln_weight, grad_ln_bias, grad_grid;
  void* workspace = nullptr;  // {forward,backward}_workspace_cuda() bytes

  int64_t depth() const { return static_cast<int64_t>(channels) * grids; }
  bool wants_u() const { return grad_x || grad_ln_weight || grad_ln_bias || grad_grid; }
};

// Launch on the stream; nothing is allocated and nothing synchronises. Throw std::runtime_error when the
// launch is refused.
void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);
int64_t forward_workspace_cuda(const Params& params);
int64_t backward_workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::kan_linear
