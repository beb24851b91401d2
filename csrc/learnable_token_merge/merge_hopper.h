// The product of merge.h on Hopper, for 16-bit tokens: a warpgroup makes 64 x 128 results.
//
// The mask lies in shared memory as it does in the matrix, 64 tokens by 64 merged ones a stage: G^T takes its
// rows as features, G its columns. While the tensor cores multiply a stage the warps normalise the mask of
// the next one, and fetch that of the one after; tokens arrive by cp.async, two stages ahead. Three blocks
// share an SM.
//
// A stage is 256 cycles of the tensor cores at their peak, and 4,096 exponentials, 256 cycles of an SM's
// special-function units, beside them.
#pragma once
#include "tiles.h"
#include "vitkernels/wgmma.h"

namespace vitkernels::learnable_token_merge {

constexpr int STAGE_DEPTH = 64, PIECE_ROW = 128, PIECE_BYTES = STAGE_DEPTH * PIECE_ROW;

struct WarpgroupShape {
  static constexpr int TOKEN_PLACES = 3, MASK_PLACES = 2;
  static constexpr int TOKENS_BYTES = COLUMNS / 64 * PIECE_BYTES;
  static constexpr int MASK = TOKEN_PLACES * TOKENS_BYTES;  // byte offset
  static constexpr int SHARED = MASK + MASK_PLACES * PIECE_BYTES;
  static constexpr int LD = COLUMNS + 8;  // of results on their way out
};

template <bool TRANSPOSED, class T, class M, class Problem>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 3) warpgroup_merge_kernel(Problem p) {
#if defined(VK_WGMMA)
  using S = WarpgroupShape;
  char* const shared = shared_memory();
  const int above = block_x() / p.tiles, batch = above / p.row_tiles;
  const int tile = block_x() - above * p.tiles, row = (above - batch * p.row_tiles) * ROWS;
  const bool second = tile >= p.first_tiles;
  const Matrices<const T> from = second ? p.second.from : p.first.from;
  const Matrices<T> to = second ? p.second.to : p.first.to;
  const int column = (second ? tile - p.first_tiles : tile) * COLUMNS;
  const int rows = TRANSPOSED ? p.mask.merged : p.mask.tokens;
  const int depth = from.data == nullptr ? 0 : TRANSPOSED ? p.mask.tokens : p.mask.merged;
  const int steps = (depth + STAGE_DEPTH - 1) / STAGE_DEPTH;

  // A thread has a chunk of eight columns of every eighth row of the stage.
  const auto load = [&](int step) {
    if (step < steps) {
      constexpr int CHUNKS = COLUMNS / 8, STEP = THREADS / CHUNKS;
      static_assert(STEP == 8, "chunks of all rows of a thread are exchanged alike");
      int thread = thread_x();
      forget(thread);  // lest what follows from it wait in registers for the next stage
      const int chunk = thread % CHUNKS, first = thread / CHUNKS, begin = step * STAGE_DEPTH + first;
      const int valid = column + 8 * chunk < from.columns ? depth - begin : 0;
      const T* at = from.at(batch, begin, column + 8 * chunk);
      char* to = shared + step % S::TOKEN_PLACES * S::TOKENS_BYTES + chunk / 8 * PIECE_BYTES +
                 first * PIECE_ROW + chunk_of<PIECE_ROW>(first, chunk % 8) * 16;
      VK_UNROLL
      for (int inside = 0; inside < STAGE_DEPTH; inside += STEP, at += STEP * from.row_stride)
        cp_async16(reinterpret_cast<T*>(to + inside * PIECE_ROW), at, inside < valid);
    }
    cp_async_commit();
  };
  MaskTile<STAGE_DEPTH, ROWS, T, M> mask;
  const auto fetch = [&](int step) {
    if (step < steps)
      mask.fetch(p.mask, batch, TRANSPOSED ? step * STAGE_DEPTH : row, TRANSPOSED ? row : step * STAGE_DEPTH);
  };
  const auto put = [&](int step) {
    if (step >= steps) return;
    char* const piece = shared + S::MASK + step % S::MASK_PLACES * PIECE_BYTES;
    mask.put(p.mask, batch, TRANSPOSED ? step * STAGE_DEPTH : row, TRANSPOSED ? row : step * STAGE_DEPTH,
             [&](int r, int c) {
               return reinterpret_cast<T*>(piece + r * PIECE_ROW + chunk_of<PIECE_ROW>(r, c / 8) * 16) +
                      c % 8;
             });
  };

  float sums[COLUMNS / 2];
  VK_UNROLL
  for (float& sum : sums) sum = 0.0f;
  hold(sums);
  load(0);
  load(1);
  fetch(0);
  put(0);
  fetch(1);
  VK_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<S::TOKEN_PLACES - 2>();
    fence_async_proxy();
    // The stage is there for all, and the product of the one before is done, by all.
    sync_block();
    using Features = Operand<PIECE_ROW, Major::BY_FEATURES>;
    using Left = Operand<PIECE_ROW, TRANSPOSED ? Major::BY_FEATURES : Major::FEATURES_SIDE_BY_SIDE>;
    const Left left(shared + S::MASK + step % S::MASK_PLACES * PIECE_BYTES);
    const Features right(shared + step % S::TOKEN_PLACES * S::TOKENS_BYTES, PIECE_BYTES);
    wgmma_fence();
    VK_UNROLL
    for (int k = 0; k < STAGE_DEPTH / 16; ++k)
      wgmma<T, COLUMNS>(sums, left.advance(k * (TRANSPOSED ? 16 * PIECE_ROW : 32)),
                        right.advance(k * 16 * PIECE_ROW));
    wgmma_commit();
    load(step + 2);
    put(step + 1);
    fetch(step + 2);
    wgmma_wait<0>();
  }
  hold(sums);
  cp_async_wait<0>();
  sync_block();  // the results take the place of the stages

  T* const tile_out = reinterpret_cast<T*>(shared);
  const int g = lane_id() / 4, t = lane_id() % 4, top = warp_id() * 16;
  VK_UNROLL
  for (int j = 0; j < COLUMNS / 8; ++j) {
    VK_UNROLL
    for (int low = 0; low < 2; ++low)
      Vec<T, 2>{{from_float<T>(sums[4 * j + 2 * low]), from_float<T>(sums[4 * j + 2 * low + 1])}}.store(
          tile_out + (top + g + 8 * low) * S::LD + 8 * j + 2 * t);
  }
  sync_warp();
  VK_NO_UNROLL
  for (int i = lane_id(); i < 16 * COLUMNS / 8; i += 32) {
    const int inside = top + i / (COLUMNS / 8), chunk = i % (COLUMNS / 8) * 8;
    if (row + inside < rows && column + chunk < to.columns)
      Vec<T, 8>::load(tile_out + inside * S::LD + chunk).store(to.at(batch, row + inside, column + chunk));
  }
#endif
}

// Whether rows of all matrices are moved 16 bytes at a time, and the product is worth a warpgroup's tiles.
template <class Problem>
bool suits_warpgroups(const Problem& p) {
  const auto moves = [](const auto& operand) {
    return operand.to.data == nullptr ||
           (operand.to.vectors && (operand.from.data == nullptr || operand.from.vectors));
  };
  return p.mask.tokens >= 48 && p.mask.merged >= 48 && moves(p.first) && moves(p.second) && wgmma_available();
}

}  // namespace vitkernels::learnable_token_merge
