// dW on Hopper, for 16-bit types and blocks with sides of 32, 64 or 128.
#pragma once
#include "parts.h"
#include "vitkernels/matrix_copy.h"

namespace vitkernels::block_sparse_linear {

constexpr int HOPPER_TOKENS = 64, LEAST_TOKENS = 512;  // of a stage; of a share

// Features of dW's rows and columns that a block of threads has; the rows go to two warpgroups.
constexpr int HOPPER_COLUMNS = 128;
inline int hopper_rows(const Params& p) {
  return (p.out_features + 127) / 128 % 2 == 0 ? 256 : 128;
}

// Whether the sizes are for these kernels: products of 64 x 64 are left out only where no block is stored, so
// that few blocks, and few tokens, are for the other kernel.
inline bool suits_hopper(const Params& p) {
  const auto side = [](int block) { return block == 32 || block == 64 || block == 128; };
  const double stored = 1.0 * p.nnz * p.block_height * p.block_width;
  return (p.dtype == DType::f16 || p.dtype == DType::bf16) && side(p.block_height) && side(p.block_width) &&
         p.tokens >= LEAST_TOKENS && p.tokens <= 0x7fffffff &&
         stored >= 0.25 * p.out_features * p.in_features;
}

// The tokens in shares that fill the GPU once.
inline Parts hopper_parts(const Params& p, int64_t partial_bytes) {
  const int64_t tiles = ceil_div(p.out_features, hopper_rows(p)) * ceil_div(p.in_features, HOPPER_COLUMNS);
  int64_t most = HOPPER_BLOCKS / tiles;
  for (const int64_t limit :
       {partial_bytes / (4 * p.nnz * p.block_height * p.block_width), p.tokens / LEAST_TOKENS})
    if (limit < most) most = limit;
  return Parts(p.tokens, most, HOPPER_TOKENS);
}

// To dW itself where there is one part, else to partial sums of float, [parts][nnz][bh][bw]; whether it
// could.
template <class T>
bool weight_hopper(const Params& p, const View& gradient, const Parts& parts, float* partials, Stream stream);

}  // namespace vitkernels::block_sparse_linear
