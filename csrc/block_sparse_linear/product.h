// The product of a matrix of tokens with the block-sparse weight or its transpose, as forward and backward
// call it.
#pragma once
#include "block_sparse_linear.h"

namespace vitkernels::block_sparse_linear {

// y = activation(x W^T + bias), or with `transposed` x W. Bias and before may be absent.
struct ProductCall {
  bool transposed;
  Activation activation;
  View x, bias, before, y;
};
void product(const Params& params, const ProductCall& call, Stream stream);

}  // namespace vitkernels::block_sparse_linear
