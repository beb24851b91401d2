#include "backward.h"
#include "vitkernels/sum_partials.h"

namespace vitkernels::cascaded_group_attention {
namespace {

// Where a range of the sums goes: elements numbered with the last dimension fastest.
struct Target {
  int64_t end;
  View view;  // absent: nowhere
  int size1, size2, size3;
  bool wide;

  Target() = default;
  Target(int64_t begin, const View& view, int size0, int size1, int size2, int size3, bool wide)
      : end(begin + static_cast<int64_t>(size0) * size1 * size2 * size3),
        view(view),
        size1(size1),
        size2(size2),
        size3(size3),
        wide(wide) {}
};

// The sums of several weights, side by side in each partial, in one launch.
template <class T>
struct StoreTargets {
  static constexpr int MOST = 4;
  Target targets[MOST];

  // Indexed with constants alone: a parameter that is not is copied to local memory.
  template <class Found>
  VK_DEVICE void find(int64_t element, const Found& found) const {
    int64_t begin = 0;
    VK_UNROLL
    for (int n = 0; n < MOST; ++n) {
      if (element >= begin && element < targets[n].end) found(targets[n], element - begin);
      begin = targets[n].end;
    }
  }
  VK_DEVICE bool wants(int64_t element) const {
    bool wanted = false;
    find(element, [&](const Target& target, int64_t) { wanted = target.view.data != nullptr; });
    return wanted;
  }
  VK_DEVICE void operator()(int64_t element, accumulate_t<T> sum) const {
    find(element, [&](const Target& target, int64_t index) {
      const int64_t i3 = index % target.size3, rest3 = index / target.size3;
      const int64_t i2 = rest3 % target.size2, rest2 = rest3 / target.size2;
      const int64_t i1 = rest2 % target.size1, i0 = rest2 / target.size1;
      const int64_t* stride = target.view.stride;
      const int64_t at = i0 * stride[0] + i1 * stride[1] + i2 * stride[2] + i3 * stride[3];
      if (target.wide) {
        static_cast<accumulate_t<T>*>(target.view.data)[at] = sum;
      } else {
        static_cast<T*>(target.view.data)[at] = from_accumulate<T>(sum);
      }
    });
  }
};

template <class T>
void reduce(const void* partials, int64_t elements, int64_t count, const StoreTargets<T>& store,
            Stream stream) {
  for (const Target& target : store.targets) {
    if (target.view) {
      sum_partials(static_cast<const accumulate_t<T>*>(partials), elements, count, elements, store, stream);
      return;
    }
  }
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
    const bool wide = problem.wide_weights;
    const WindowSums in_block(problem);
    const StoreTargets<T> window{{
        {in_block.tables, p.grad_attn_bias, heads, problem.tokens, 1, 1, problem.wide_table},
        {in_block.taps, p.grad_dw_weight, heads, k, taps, taps, wide},
        {in_block.biases, p.grad_dw_bias, heads, k, 1, 1, wide},
        {in_block.elements, View{}, 0, 1, 1, 1, wide},
    }};
    reduce(base + w.window_sums, in_block.elements, w.blocks, window, stream);
    const WeightSums in_chunk(problem);
    const StoreTargets<T> weight{{
        {in_chunk.qkv_weight, p.grad_qkv_weight, heads, rows, d, 1, wide},
        {in_chunk.qkv_bias, p.grad_qkv_bias, heads, rows, 1, 1, wide},
        {in_chunk.proj_weight, p.grad_proj_weight, p.channels, p.channels, 1, 1, wide},
        {in_chunk.proj_bias, p.grad_proj_bias, p.channels, 1, 1, 1, wide},
    }};
    reduce(base + w.weight_sums, in_chunk.elements, w.chunks, weight, stream);
  });
}

}  // namespace vitkernels::cascaded_group_attention
