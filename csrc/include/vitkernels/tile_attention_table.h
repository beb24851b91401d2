// A learned table of biases as an operator's logits meet it, and the last step of its gradient. Beside the
// hooks of tile_attention.h a map then has
//   wide_table                      whether the table is of type Acc rather than T
//   table_entries()                 of one head
//   table_offset(view, entry)       where an entry lies in one head of a tensor of the table's shape
//   source(entry, i)                the i-th, of at most SOURCES, of the elements of gradient() that make up
//                                   an entry's gradient, or -1
#pragma once
#include "vitkernels/tile_attention_backward.h"

namespace vitkernels::tile_attention {

constexpr int REDUCE_THREADS = 128;

// Entry `entry` of a head's biases times unit: how tables are staged in shared memory.
template <class T, class Map>
VK_DEVICE accumulate_t<T> read_table(const Map& map, const View& table, int64_t head, int entry) {
  using Acc = accumulate_t<T>;
  const int64_t index = head * table.stride[0] + map.table_offset(table, entry);
  const Acc value = map.wide_table ? static_cast<const Acc*>(table.data)[index]
                                   : to_accumulate(static_cast<const T*>(table.data)[index]);
  return value * static_cast<Acc>(Exponential<T>::unit);
}

// grad_table[head, entry] = its sources in partials [count, heads, gradient_elements], summed over count in a
// fixed order. One block each: the partials are few and in L2, so it is the latency of the loads that counts.
template <class T, class Map>
VK_KERNEL void VK_LAUNCH_BOUNDS(REDUCE_THREADS, 1)
    reduce_table_kernel(const accumulate_t<T>* partials, int64_t count, View grad_table, Map map,
                        int64_t heads) {
  using Acc = accumulate_t<T>;
  const int64_t head = block_x() / map.table_entries(), elements = map.gradient_elements();
  const int entry = block_x() % map.table_entries();
  Acc sum = Acc(0);
  for (int s = 0; s < Map::SOURCES; ++s) {
    const int64_t source = map.source(entry, s);
    if (source < 0) continue;
    for (int64_t i = thread_x(); i < count; i += REDUCE_THREADS)
      sum += partials[(i * heads + head) * elements + source];
  }
  sum = block_sum(sum, reinterpret_cast<Acc*>(shared_memory()));
  if (thread_x() == 0) {
    const int64_t index = head * grad_table.stride[0] + map.table_offset(grad_table, entry);
    if (map.wide_table) {
      static_cast<Acc*>(grad_table.data)[index] = sum;
    } else {
      static_cast<T*>(grad_table.data)[index] = from_accumulate<T>(sum);
    }
  }
}

// Bytes that backward_with_table() needs: the rows of the queries, and partial sums behind them.
template <class T, class Map>
int64_t table_workspace(const Problem& problem, const Map& map, const View& grad_table) {
  const int64_t rows = query_rows_workspace<T>(problem, map);
  if (!present(grad_table)) return rows;
  return rows + backward_partials<T>(problem, map) * problem.heads * map.gradient_elements() *
                    static_cast<int64_t>(sizeof(accumulate_t<T>));
}

// backward(), and the gradient of the table unless grad_table is absent.
template <class T, class Map>
void backward_with_table(Problem problem, const Map& map, const View& grad_table, void* workspace,
                         Stream stream) {
  using Acc = accumulate_t<T>;
  Acc* const partials =
      reinterpret_cast<Acc*>(static_cast<char*>(workspace) + query_rows_workspace<T>(problem, map));
  problem.query_rows = workspace;
  problem.gradient_partials = present(grad_table) ? partials : nullptr;
  backward<T>(problem, map, stream);
  if (!present(grad_table)) return;
  launch(reduce_table_kernel<T, Map>, Dim3{static_cast<int64_t>(problem.heads) * map.table_entries()},
         REDUCE_THREADS, REDUCE_THREADS / 32 * sizeof(Acc), stream, static_cast<const Acc*>(partials),
         backward_partials<T>(problem, map), grad_table, map, static_cast<int64_t>(problem.heads));
}

}  // namespace vitkernels::tile_attention
