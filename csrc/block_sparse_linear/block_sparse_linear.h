// Linear map with a block-sparse weight W [O, I]: y = activation(x W^T + bias), or with `transposed`
// y = activation(x W + bias).
#pragma once
#include "vitkernels/params.h"

namespace vitkernels::block_sparse_linear {

// The order is shared with vitkernels/kernels/block_sparse_linear/native.py.
enum class Activation : int { none = 0, gelu = 1, relu = 2 };

// Where the stored blocks p lie, by block rows (p in order) and by block columns.
struct Index {
  const int32_t* crow;    // [block_rows + 1]
  const int32_t* col;     // [nnz], ascending inside a row
  const int32_t* row;     // [nnz]
  const int32_t* crow_t;  // [block_cols + 1]
  const int32_t* row_t;   // [nnz], ascending inside a column
  const int32_t* perm_t;  // [nnz]: the block p at this place of the columns' order

  // From the one array that holds all six, in this order.
  Index(const int32_t* packed, int block_rows, int block_cols, int64_t nnz)
      : crow(packed),
        col(crow + block_rows + 1),
        row(col + nnz),
        crow_t(row + nnz),
        row_t(crow_t + block_cols + 1),
        perm_t(row_t + nnz) {}
};

// All tensors have `dtype`; sums are in f64 for f64, else in f32. Matrices have dense rows, values, bias,
// grad_values, grad_bias and grad_before are dense. `taken` and `given` are the features of x and y: I and O,
// or O and I where transposed.
struct Params {
  DType dtype;
  Activation activation;
  bool transposed;
  int64_t tokens;
  int out_features, in_features;  // O, I
  int block_height, block_width;  // bh, bw
  int block_rows, block_cols;     // ceil(O / bh), ceil(I / bw)
  int64_t nnz;
  const int32_t* index;  // packed, as Index takes it; on the tensors' device

  View x;       // [tokens, taken]
  View values;  // [nnz, bh, bw]; what lies beyond O or I may hold anything and is used for nothing
  View bias;    // [given], optional
  View y;       // [tokens, given]; backward: with relu only
  View before;  // [tokens, given], what goes into a GELU. Forward: written where present; backward: read

  // Backward only. Each gradient may be absent.
  View grad_y;       // [tokens, given]
  View grad_before;  // [tokens, given], CUDA with an activation: written first, then read in grad_y's place
  View grad_x;       // [tokens, taken]
  View grad_values;  // [nnz, bh, bw], exactly 0 beyond O or I
  View grad_bias;    // [given]
  void* workspace = nullptr;  // {forward,backward}_workspace_cuda() bytes

  int taken() const { return transposed ? out_features : in_features; }
  int given() const { return transposed ? in_features : out_features; }
};

// Launch on the stream; nothing is allocated and nothing synchronises. Throw std::runtime_error when the
// launch is refused.
void forward_cuda(const Params& params, Stream stream);
void backward_cuda(const Params& params, Stream stream);
int64_t forward_workspace_cuda(const Params& params);
int64_t backward_workspace_cuda(const Params& params);

void forward_cpu(const Params& params, int threads);
void backward_cpu(const Params& params, int threads);

}  // namespace vitkernels::block_sparse_linear
