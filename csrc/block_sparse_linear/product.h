// The products that forward and backward are made of.
#pragma once
#include "block_sparse_linear.h"

namespace vitkernels::block_sparse_linear {

// y = activation(x W^T + bias), or with `transposed` x W. Bias and before may be absent.
struct ProductCall {
  bool transposed;
  Activation activation;
  View x, bias, before, y;
  void* workspace;  // product_workspace() bytes, or null where they are 0
};
int64_t product_workspace(const Params& params, bool transposed);
void product(const Params& params, const ProductCall& call, Stream stream);

// params.grad_values from the gradient of what goes into the activation.
int64_t weight_gradient_workspace(const Params& params);
void weight_gradient(const Params& params, const View& gradient, void* workspace, Stream stream);

}  // namespace vitkernels::block_sparse_linear
