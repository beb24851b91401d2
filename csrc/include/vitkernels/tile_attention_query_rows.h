// What a query has of its own in the backward of the tile-attention core, found once for both sides: its lse,
// and delta = sum(out grad_out) less grad_lse.
#pragma once
#include "vitkernels/tile_attention_memory.h"

namespace vitkernels::tile_attention {

constexpr int ROW_THREADS = 128;

// lse times unit, delta - grad_lse; [batch, heads, query_count()].
using QueryRow = Vec<float, 2>;

template <int WIDTH, class T, class Map>
VK_KERNEL void VK_LAUNCH_BOUNDS(ROW_THREADS, 8)
    query_rows_kernel(Problem problem, Map map, int blocks_per_head, bool wide) {
  constexpr int CHUNK = 16 / sizeof(T), LANES = WIDTH / CHUNK, ROWS = ROW_THREADS / LANES;
  const int unit = block_x() / blocks_per_head;
  const int number = (block_x() - unit * blocks_per_head) * ROWS + thread_x() / LANES;
  const int batch = unit / problem.heads, head = unit - batch * problem.heads;
  const bool exists = number < map.query_count();
  const int token = exists ? query_at(map, number, 0) : -1, channel = thread_x() % LANES * CHUNK;
  const Matrix<T, Map> out(problem.out, map, batch, head, problem.value_dim);
  const Matrix<T, Map> grad_out(problem.grad_out, map, batch, head, problem.value_dim);
  float delta = 0.0f;
  if (exists && wide && channel < problem.value_dim) {
    const auto a = Vec<T, CHUNK>::load(grad_out.position.near(grad_out.data + channel, token));
    const auto b = Vec<T, CHUNK>::load(out.position.near(out.data + channel, token));
    VK_UNROLL
    for (int e = 0; e < CHUNK; ++e) delta += to_float(a[e]) * to_float(b[e]);
  } else if (exists && !wide && present(problem.grad_out)) {
    const T* const a = grad_out.data + grad_out.position(token);
    const T* const b = out.data + out.position(token);
    for (int c = channel; c < channel + CHUNK && c < problem.value_dim; ++c)
      delta += to_float(a[c * grad_out.channel_stride]) * to_float(b[c * out.channel_stride]);
  }
  delta = warp_sum<LANES>(delta);
  if (!exists || channel != 0) return;
  const auto of_token = [&](const View& view) {
    return offset<float>(view, batch, head)[typename PositionsOf<Map>::type(view, map)(token)];
  };
  const float shift = present(problem.grad_lse) ? delta - of_token(problem.grad_lse) : delta;
  QueryRow{{of_token(problem.lse) * Exponential<T>::unit, shift}}.store(
      static_cast<float*>(problem.query_rows) +
      2 * (static_cast<int64_t>(unit) * map.query_count() + number));
}

template <int WIDTH, class T, class Map>
void find_query_rows(const Problem& problem, const Map& map, Stream stream) {
  constexpr int ROWS = ROW_THREADS / (WIDTH / (16 / static_cast<int>(sizeof(T))));
  const int blocks = static_cast<int>((map.query_count() + int64_t{ROWS} - 1) / ROWS);
  const auto wide = [&](const View& view) { return moves_wide<T>(view, problem, problem.value_dim); };
  launch(query_rows_kernel<WIDTH, T, Map>, Dim3{static_cast<int64_t>(problem.batch) * problem.heads * blocks},
         ROW_THREADS, 0, stream, problem, map, blocks, wide(problem.grad_out) && wide(problem.out));
}

}  // namespace vitkernels::tile_attention
