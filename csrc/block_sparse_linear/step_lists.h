// Which blocks the tiles of the warpgroup product meet, found once a call and not by every tile.
//
// Outputs come in slots, each a part of one block row, and a group of slots is what one tile computes. The
// union of the columns stored in a group is cut into steps of STEP_DEPTH features; a group's list has one
// entry a step, in ascending order: [place << MASK_BITS | mask, offsets...]. Its features begin at place *
// STEP_DEPTH and bit s of the mask says whether slot s stores weights for them, which begin offsets[s] * 16
// bytes into the values. An entry of 0 follows the last one.
#pragma once
#include "elements.h"

namespace vitkernels::block_sparse_linear {

constexpr int STEP_DEPTH = 32, MASK_BITS = 8;
constexpr int MOST_STEPS = 768;  // a block of threads keeps its list in shared memory

struct StepLists {
  int* entries;                             // [groups][ints()]
  const int32_t *pointers, *indices, *ids;  // as in Problem
  int rows, columns;                        // of blocks
  int slots, slots_of_row;                  // of a group, of a block row
  int steps_of_block;
  int block, slot_stride,
      step_stride;  // in 16 bytes: a block, and from a slot or step of a block to the next

  VK_HOST_DEVICE int entry() const { return 1 + slots; }
  VK_HOST_DEVICE int ints() const { return (columns * steps_of_block + 1) * entry(); }
  VK_HOST_DEVICE int groups() const { return (rows * slots_of_row + slots - 1) / slots; }
  VK_HOST_DEVICE int64_t bytes() const { return int64_t{4} * groups() * ints(); }
};

void list_steps(const StepLists& lists, Stream stream);

}  // namespace vitkernels::block_sparse_linear
