// The order in which threads share out a tile of 16-byte chunks, for rows of a power of two of them.
//
// Neighbours take one chunk of 1 << row_bits rows before they take the next chunk of these. Shared memory
// serves eight chunks at a time, from eight threads: with rows 16 bytes longer than a multiple of 32, one
// chunk of eight rows lies in all its banks, as do eight chunks of one row, but two chunks of four rows or
// four of two do not.
#pragma once
#include "vitkernels/device.h"

namespace vitkernels {

struct ChunkOrder {
  int chunk_bits, row_bits;

  VK_DEVICE static ChunkOrder of(int chunk_bits) { return {chunk_bits, chunk_bits < 3 ? 3 : 0}; }
  VK_DEVICE int row(int i) const {
    return (i >> (row_bits + chunk_bits) << row_bits) + (i & ((1 << row_bits) - 1));
  }
  VK_DEVICE int chunk(int i) const { return i >> row_bits & ((1 << chunk_bits) - 1); }
};

VK_HOST_DEVICE constexpr int log2_of(int power) {
  return power == 1 ? 0 : 1 + log2_of(power / 2);
}

}  // namespace vitkernels
