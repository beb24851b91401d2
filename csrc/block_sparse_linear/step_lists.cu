// Floor: nothing but latency; the index is a few KB, and one launch is paid a call.
#include "step_lists.h"

namespace vitkernels::block_sparse_linear {
namespace {

constexpr int LIST_WARPS = 8, LIST_THREADS = 32 * LIST_WARPS;

template <class Offset>
VK_DEVICE void write_entry(int* entry, const StepLists& lists, int head, Offset offset) {
  VK_NO_UNROLL
  for (int w = 0; w < lists.warpgroups; ++w, entry += lists.record()) {
    entry[0] = head;
    VK_NO_UNROLL
    for (int i = 1, unit = w; i < lists.record(); ++i, unit += lists.warpgroups)
      entry[i] = unit < lists.units() ? offset(unit) : -1;
  }
}

// A block of threads has a group.
VK_KERNEL void VK_LAUNCH_BOUNDS(LIST_THREADS, 1) list_kernel(StepLists lists) {
  int* table = reinterpret_cast<int*>(shared_memory());  // [columns][slots]: the stored block, or -1
  int* totals = table + lists.columns * lists.slots;     // [LIST_WARPS]
  VK_NO_UNROLL
  for (int i = thread_x(); i < lists.columns * lists.slots; i += LIST_THREADS) table[i] = -1;
  sync_block();
  VK_NO_UNROLL
  for (int slot = warp_id(); slot < lists.slots; slot += LIST_WARPS) {
    const int row = (block_x() * lists.slots + slot) / lists.slots_of_row;
    if (row >= lists.rows) continue;
    const int end = lists.pointers[row + 1];
    VK_NO_UNROLL
    for (int at = lists.pointers[row] + lane_id(); at < end; at += 32)
      table[lists.indices[at] * lists.slots + slot] = lists.ids == nullptr ? at : lists.ids[at];
  }
  sync_block();

  int* const list = lists.entries + static_cast<int64_t>(block_x()) * lists.ints();
  int* const entries = list + LIST_HEAD;
  int count = 0;  // of columns so far in which the group stores something
  VK_NO_UNROLL
  for (int first = 0; first < lists.columns; first += LIST_THREADS) {
    const int column = first + thread_x();
    const int* row = table + column * lists.slots;
    int mask = 0;
    VK_NO_UNROLL
    for (int slot = 0; slot < lists.slots; ++slot)
      if (column < lists.columns && row[slot] >= 0) mask |= 1 << slot;
    int rank = mask != 0 ? 1 : 0;  // of such columns up to this one
    VK_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = shfl(rank, lane_id() < distance ? lane_id() : lane_id() - distance);
      if (lane_id() >= distance) rank += other;
    }
    if (lane_id() == 31) totals[warp_id()] = rank;
    sync_block();
    int all = 0;
    VK_UNROLL
    for (int warp = 0; warp < LIST_WARPS; ++warp) {
      if (warp < warp_id()) rank += totals[warp];
      all += totals[warp];
    }
    if (mask != 0) {
      int* entry = entries + (count + rank - 1) * lists.steps_of_block * lists.entry();
      VK_NO_UNROLL
      for (int step = 0; step < lists.steps_of_block; ++step, entry += lists.entry()) {
        const int head = (column * lists.steps_of_block + step) << MASK_BITS | mask;
        write_entry(entry, lists, head, [&](int unit) {
          const int slot = unit / lists.units_of_slot;
          const int inside = (block_x() * lists.slots + slot) % lists.slots_of_row;
          return row[slot] < 0
                     ? -1
                     : row[slot] * lists.block + inside * lists.slot_stride +
                           unit % lists.units_of_slot * lists.unit_stride + step * lists.step_stride;
        });
      }
    }
    count += all;
    sync_block();  // the totals have been read
  }
  if (thread_x() != 0) return;
  count *= lists.steps_of_block;
  VK_NO_UNROLL
  for (; count % lists.steps_of_stage != 0; ++count)
    write_entry(entries + count * lists.entry(), lists, lists.columns * lists.steps_of_block << MASK_BITS,
                [](int) { return -1; });
  list[0] = count;
}

}  // namespace

void list_steps(const StepLists& lists, Stream stream) {
  const size_t shared = sizeof(int) * (static_cast<size_t>(lists.columns) * lists.slots + LIST_WARPS);
  launch(list_kernel, {lists.groups()}, LIST_THREADS, shared, stream, lists);
}

}  // namespace vitkernels::block_sparse_linear
