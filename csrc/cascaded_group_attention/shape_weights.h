// Weights as row_product.h wants them.
#pragma once
#include "tensor.h"

namespace vitkernels::cascaded_group_attention {

// Weights that are wider than T, or lie otherwise than DenseWeights wants them, are brought into shape in the
// workspace before.
inline bool shaped(const View& weight, int rows_at) {
  const int64_t* stride = weight.stride + rows_at;
  return stride[1] == 1 && stride[0] % 8 == 0 && (rows_at == 0 || weight.stride[0] % 8 == 0) &&
         reinterpret_cast<uintptr_t>(weight.data) % 16 == 0;
}

constexpr int SHAPED_AT_ONCE = 1024;

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 1)
    shape_weights_kernel(Problem problem, T* target, int64_t of_heads, int64_t all) {
  const Params& params = problem.params;
  const View &qkv = params.qkv_weight, &proj = params.proj_weight;
  const int d = problem.value_dim, channels = params.channels;
  const int64_t first = static_cast<int64_t>(block_x()) * SHAPED_AT_ONCE;
  for (int64_t i = first + thread_x(); i < first + SHAPED_AT_ONCE && i < all; i += THREADS) {
    if (i < of_heads) {
      const int row = static_cast<int>(i / d), column = static_cast<int>(i % d);
      const int head = row / problem.qkv_rows;
      target[i] = from_float<T>(read<T>(
          qkv, problem.wide_weights,
          head * qkv.stride[0] + (row - head * problem.qkv_rows) * qkv.stride[1] + column * qkv.stride[2]));
    } else {
      const int64_t row = (i - of_heads) / channels, column = (i - of_heads) % channels;
      target[i] =
          from_float<T>(read<T>(proj, problem.wide_weights, row * proj.stride[0] + column * proj.stride[1]));
    }
  }
}

// Makes the weights fit for the tensor-core kernel; the bytes of workspace that this lacks, else 0.
template <class T>
int64_t shape_weights(Problem* problem, Stream stream) {
  Params& params = problem->params;
  if (!problem->wide_weights && shaped(params.qkv_weight, 1) && shaped(params.proj_weight, 0)) return 0;
  const int64_t channels = params.channels, of_heads = channels * problem->qkv_rows,
                all = of_heads + channels * channels;
  if (params.workspace == nullptr) return all * static_cast<int64_t>(sizeof(T));
  auto* target = static_cast<T*>(params.workspace);
  launch(shape_weights_kernel<T>, Dim3{(all + SHAPED_AT_ONCE - 1) / SHAPED_AT_ONCE}, THREADS, 0, stream,
         *problem, target, of_heads, all);
  params.qkv_weight =
      View{target, {static_cast<int64_t>(problem->qkv_rows) * problem->value_dim, problem->value_dim, 1}};
  params.proj_weight = View{target + of_heads, {channels, 1}};
  return 0;
}

}  // namespace vitkernels::cascaded_group_attention
