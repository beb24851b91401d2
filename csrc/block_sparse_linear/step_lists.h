// Which blocks the tiles of the warpgroup product meet, found once a call and not by every tile.
//
// Outputs come in slots, each a part of one block row, and a group of slots is what one tile computes. The
// union of the columns stored in a group is cut into steps of STEP_DEPTH features; a group's list has one
// entry a step, in ascending order. An entry is a record for each warpgroup, which a thread reads at once:
// [place << MASK_BITS | mask, offsets...]. The step's features begin at place * STEP_DEPTH and bit s of the
// mask says whether slot s stores weights for them. Slots are copied in units, a half or all of one; the
// offsets are those of the units that the warpgroup copies, w, w + warpgroups and so on for warpgroup w: they
// begin so many times 16 bytes into the values, or are not stored where an offset is negative. Entries come
// in whole stages, the last of which may end in a step without slots and behind all features. How many there
// are is the first int of a list, its entries begin LIST_HEAD ints on.
#pragma once
#include "elements.h"

namespace vitkernels::block_sparse_linear {

constexpr int STEP_DEPTH = 32, MASK_BITS = 8, LIST_HEAD = 4;
constexpr int MOST_STEPS = 640;  // a block of threads keeps its list in shared memory

// Ints of a warpgroup's record: whole 16 bytes.
VK_HOST_DEVICE constexpr int record_ints(int units, int warpgroups) {
  return (1 + (units + warpgroups - 1) / warpgroups + 3) / 4 * 4;
}

struct StepLists {
  int* entries;                             // [groups][ints()]
  const int32_t *pointers, *indices, *ids;  // as in Problem
  int rows, columns;                        // of blocks
  int slots, slots_of_row;                  // of a group, of a block row
  int units_of_slot;
  int warpgroups;
  int steps_of_block, steps_of_stage;
  // In 16 bytes: a block, and from a slot, unit or step of a block to the next.
  int block, slot_stride, unit_stride, step_stride;

  VK_HOST_DEVICE int units() const { return slots * units_of_slot; }
  VK_HOST_DEVICE int record() const { return record_ints(units(), warpgroups); }
  VK_HOST_DEVICE int entry() const { return warpgroups * record(); }
  VK_HOST_DEVICE int ints() const {
    return LIST_HEAD + (columns * steps_of_block + steps_of_stage - 1) * entry();
  }
  VK_HOST_DEVICE int groups() const { return (rows * slots_of_row + slots - 1) / slots; }
  VK_HOST_DEVICE int64_t bytes() const { return int64_t{4} * groups() * ints(); }
};

void list_steps(const StepLists& lists, Stream stream);

}  // namespace vitkernels::block_sparse_linear
