#include "backward.h"

namespace vitkernels::cascaded_group_attention {
namespace {

constexpr int REDUCE_LANES = 32;

// target[e] = the sum of partials[i * stride + e] over `count` partial sums: a warp takes every eighth of
// them, and the eight sums meet in a fixed order. Elements of the target are numbered with the last dimension
// fastest.
template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 1)
    reduce_sums_kernel(const accumulate_t<T>* partials, int64_t stride, int64_t count, int64_t elements,
                       View target, int size1, int size2, int size3, bool wide) {
  using Acc = accumulate_t<T>;
  auto* sums = reinterpret_cast<Acc*>(shared_memory());
  const int64_t element = static_cast<int64_t>(block_x()) * REDUCE_LANES + lane_id();
  Acc sum = Acc(0);
  if (element < elements) {
    for (int64_t i = warp_id(); i < count; i += THREADS / 32) sum += partials[i * stride + element];
  }
  sums[thread_x()] = sum;
  sync_block();
  if (warp_id() > 0 || element >= elements) return;
  for (int warp = 1; warp < THREADS / 32; ++warp) sum += sums[warp * 32 + lane_id()];
  const int64_t i3 = element % size3, i2 = element / size3 % size2, i1 = element / size3 / size2 % size1;
  const int64_t i0 = element / size3 / size2 / size1;
  const int64_t at =
      i0 * target.stride[0] + i1 * target.stride[1] + i2 * target.stride[2] + i3 * target.stride[3];
  if (wide) {
    static_cast<Acc*>(target.data)[at] = sum;
  } else {
    static_cast<T*>(target.data)[at] = from_accumulate<T>(sum);
  }
}

struct Sums {
  const char* partials;
  int64_t stride, count;
};

template <class T>
void reduce(const Sums& sums, int64_t first, View target, int size0, int size1, int size2, int size3,
            bool wide, Stream stream) {
  using Acc = accumulate_t<T>;
  if (!target) return;
  const int64_t elements = static_cast<int64_t>(size0) * size1 * size2 * size3;
  launch(reduce_sums_kernel<T>, Dim3{(elements + REDUCE_LANES - 1) / REDUCE_LANES}, THREADS,
         THREADS * sizeof(Acc), stream, reinterpret_cast<const Acc*>(sums.partials) + first, sums.stride,
         sums.count, elements, target, size1, size2, size3, wide);
}

template <class T>
Workspace workspace_of(const Problem& problem) {
  using Acc = accumulate_t<T>;
  const Params& p = problem.params;
  const int64_t rows = problem.windows * problem.tokens;
  Workspace w{};
  if constexpr (sizeof(T) == 2) w.blocks = backward_blocks_tensor(problem);
  w.tensor = w.blocks > 0;
  const PlainSlots slots = backward_slots_plain<T>(problem);
  if (!w.tensor) w.blocks = slots.blocks;
  // At least eight tiles of 64 tokens a chunk, at most 64 chunks: 64 x 590 KB of sums for the widest model.
  const int64_t tiles = (rows + 63) / 64, most = (tiles + 7) / 8;
  const int64_t wanted = most < 64 ? most : 64;
  w.rows_per_chunk = (tiles + wanted - 1) / wanted * 64;
  w.chunks = (rows + w.rows_per_chunk - 1) / w.rows_per_chunk;
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t offset = used;
    used += (bytes + 255) / 256 * 256;
    return offset;
  };
  w.grad_y = take(rows * p.num_heads * problem.qkv_rows * static_cast<int64_t>(sizeof(T)));
  w.grad_z = take(w.tensor ? rows * p.channels * static_cast<int64_t>(sizeof(T)) : 0);
  w.slots = take(w.tensor ? 0 : slots.workspace());
  w.window_sums = take(w.blocks * WindowSums(problem).elements * static_cast<int64_t>(sizeof(Acc)));
  w.weight_sums = take(w.chunks * WeightSums(problem).elements * static_cast<int64_t>(sizeof(Acc)));
  w.bytes = used;
  return w;
}

}  // namespace

int64_t backward_workspace_cuda(const Params& params) {
  const Problem problem(params);
  return with_dtype(params.dtype, [&](auto zero) { return workspace_of<decltype(zero)>(problem).bytes; });
}

void backward_cuda(const Params& params, Stream stream) {
  const Problem problem(params);
  const Params& p = params;
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Workspace w = workspace_of<T>(problem);
    if (wants_windows(p)) {
      if constexpr (sizeof(T) == 2) {
        if (w.tensor) backward_windows_tensor<T>(problem, w, stream);
      }
      if (!w.tensor) backward_windows_plain<T>(problem, w, stream);
    }
    if (wants_qkv(p) || wants_proj(p)) weight_sums<T>(problem, w, stream);

    const int heads = p.num_heads, k = p.key_dim, taps = p.kernel_max, rows = problem.qkv_rows,
              d = problem.value_dim;
    const char* base = static_cast<const char*>(p.workspace);
    const WindowSums in_block(problem);
    const Sums window{base + w.window_sums, in_block.elements, w.blocks};
    reduce<T>(window, in_block.tables, p.grad_attn_bias, heads, problem.tokens, 1, 1, problem.wide_table,
              stream);
    reduce<T>(window, in_block.taps, p.grad_dw_weight, heads, k, taps, taps, problem.wide_weights, stream);
    reduce<T>(window, in_block.biases, p.grad_dw_bias, heads, k, 1, 1, problem.wide_weights, stream);
    const WeightSums in_chunk(problem);
    const Sums weight{base + w.weight_sums, in_chunk.elements, w.chunks};
    reduce<T>(weight, in_chunk.qkv_weight, p.grad_qkv_weight, heads, rows, d, 1, problem.wide_weights,
              stream);
    reduce<T>(weight, in_chunk.qkv_bias, p.grad_qkv_bias, heads, rows, 1, 1, problem.wide_weights, stream);
    reduce<T>(weight, in_chunk.proj_weight, p.grad_proj_weight, p.channels, p.channels, 1, 1,
              problem.wide_weights, stream);
    reduce<T>(weight, in_chunk.proj_bias, p.grad_proj_bias, p.channels, 1, 1, 1, problem.wide_weights,
              stream);
  });
}

}  // namespace vitkernels::cascaded_group_attention
