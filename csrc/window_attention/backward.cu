#include "map.h"

namespace vitkernels::window_attention {
namespace {

constexpr int REDUCE_THREADS = 128;

// grad_bias_table[head, entry] = its signed entries of partials [count, heads, signed entries], summed over
// count in a fixed order. One block each: the partials are few and in L2, so it is the latency of the loads
// that counts.
template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(REDUCE_THREADS, 1)
    reduce_table_kernel(const accumulate_t<T>* partials, int64_t count, View grad_table, WindowMap<T> map,
                        int64_t heads) {
  using Acc = accumulate_t<T>;
  const int entries = map.signed_bias ? map.signed_entries() : map.tokens();
  const int64_t head = block_x() / entries;
  const int entry = block_x() % entries;
  // An entry for (|dy|, |dx|) gathers up to four signed ones.
  const int dy = map.signed_bias ? 0 : entry / map.window_w, dx = map.signed_bias ? 0 : entry % map.window_w;
  const int64_t center = static_cast<int64_t>(map.window_h - 1) * map.pitch() + map.window_w - 1;
  Acc sum = Acc(0);
  for (int mirror_y = 0; mirror_y < (dy > 0 ? 2 : 1); ++mirror_y) {
    for (int mirror_x = 0; mirror_x < (dx > 0 ? 2 : 1); ++mirror_x) {
      const int64_t source =
          map.signed_bias ? entry : center + (mirror_y ? -dy : dy) * map.pitch() + (mirror_x ? -dx : dx);
      for (int64_t i = thread_x(); i < count; i += REDUCE_THREADS)
        sum += partials[(i * heads + head) * map.signed_entries() + source];
    }
  }
  sum = block_sum(sum, reinterpret_cast<Acc*>(shared_memory()));
  if (thread_x() == 0) {
    const int64_t index = head * grad_table.stride[0] + entry * grad_table.stride[1];
    if (map.wide_table) {
      static_cast<Acc*>(grad_table.data)[index] = sum;
    } else {
      static_cast<T*>(grad_table.data)[index] = from_accumulate<T>(sum);
    }
  }
}

}  // namespace

int64_t backward_workspace_cuda(const Params& params) {
  if (!params.grad_bias_table) return 0;
  const tile_attention::Problem problem = make_problem(params);
  return with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const WindowMap<T> map(params);
    const int64_t count = tile_attention::backward_partials<T>(problem, map);
    return count * params.heads * map.gradient_elements() * static_cast<int64_t>(sizeof(accumulate_t<T>));
  });
}

void backward_cuda(const Params& params, Stream stream) {
  tile_attention::Problem problem = make_problem(params);
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Acc = accumulate_t<T>;
    const WindowMap<T> map(params);
    if (!params.grad_bias_table) return tile_attention::backward<T>(problem, map, stream);
    problem.gradient_partials = params.workspace;
    tile_attention::backward<T>(problem, map, stream);
    launch(reduce_table_kernel<T>, Dim3{params.heads * params.entries()}, REDUCE_THREADS,
           REDUCE_THREADS / 32 * sizeof(Acc), stream, static_cast<const Acc*>(params.workspace),
           tile_attention::backward_partials<T>(problem, map), params.grad_bias_table, map, params.heads);
  });
}

}  // namespace vitkernels::window_attention
