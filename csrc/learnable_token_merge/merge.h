// The product of the mask with the tokens of a batch entry: y = G^T x, and for the backward x = G y. A block
// of threads makes ROWS x COLUMNS results; their columns are those of one operand or of the other.
//
// The tokens' tiles arrive by cp.async, STAGES - 1 stages ahead. The mask's pass through registers, where
// they are normalised, one stage ahead: each tile of COLUMNS columns makes its own, which costs a 16-bit
// element an exponential for 128 multiply-adds, half the time of these on an H100's tensor cores, beside
// them.
#pragma once
#include "merge_hopper.h"
#include "tiles.h"

namespace vitkernels::learnable_token_merge {

// What one operand brings, and where its results go. Without tokens they are zero.
template <class T>
struct Operand {
  Matrices<const T> from;
  Matrices<T> to;
};

template <class T, class M>
struct MergeProblem {
  Mask<T, M> mask;
  Operand<T> first, second;
  int row_tiles, first_tiles, tiles;  // of results; column tiles of the first operand, of both
};

template <class T, bool TRANSPOSED>
struct MergeShape {
  using C = Config<T>;
  static constexpr int LD_MASK = TRANSPOSED ? C::LD_ROWS : C::LD_DEPTH;
  static constexpr int MASK = TRANSPOSED ? C::DEPTH * LD_MASK : ROWS * LD_MASK;
  static constexpr int STAGE = MASK + C::DEPTH * C::LD_COLUMNS;
  static constexpr size_t STAGED = sizeof(T) * C::STAGES * STAGE;
  static constexpr size_t SHARED = STAGED > result_bytes<T, T>() ? STAGED : result_bytes<T, T>();
};

// TRANSPOSED: G^T.
template <bool TRANSPOSED, class T, class M>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, sizeof(T) == 2   ? 3
                                         : sizeof(T) == 4 ? 2
                                                          : 1) merge_kernel(MergeProblem<T, M> p) {
  using C = Config<T>;
  using S = MergeShape<T, TRANSPOSED>;
  constexpr int STAGES = C::STAGES, DEPTH = C::DEPTH;
  T* const stages = reinterpret_cast<T*>(shared_memory());
  const int above = block_x() / p.tiles, batch = above / p.row_tiles;
  const int tile = block_x() - above * p.tiles, row = (above - batch * p.row_tiles) * ROWS;
  const bool second = tile >= p.first_tiles;
  const Matrices<const T> from = second ? p.second.from : p.first.from;
  const Matrices<T> to = second ? p.second.to : p.first.to;
  const int column = (second ? tile - p.first_tiles : tile) * COLUMNS;
  const int rows = TRANSPOSED ? p.mask.merged : p.mask.tokens;
  const int depth = from.data == nullptr ? 0 : TRANSPOSED ? p.mask.tokens : p.mask.merged;
  const int steps = (depth + DEPTH - 1) / DEPTH;

  const auto load = [&](int step) {
    if (step < steps)
      load_tile<DEPTH, COLUMNS>(stages + step % STAGES * S::STAGE + S::MASK, C::LD_COLUMNS, from, batch,
                                step * DEPTH, depth, column);
    cp_async_commit();
  };
  MaskTile<TRANSPOSED ? DEPTH : ROWS, TRANSPOSED ? ROWS : DEPTH, T, M> mask;
  const auto fetch = [&](int step) {
    mask.fetch(p.mask, batch, TRANSPOSED ? step * DEPTH : row, TRANSPOSED ? row : step * DEPTH);
  };
  const auto put = [&](int step) {
    T* const tile = stages + step % STAGES * S::STAGE;
    mask.put(p.mask, batch, TRANSPOSED ? step * DEPTH : row, TRANSPOSED ? row : step * DEPTH,
             [&](int r, int c) { return tile + r * S::LD_MASK + c; });
  };

  WarpSums<T, TILES> sums;
  clear_sums<T, TILES>(sums);
  VK_UNROLL
  for (int s = 0; s < STAGES - 1; ++s) load(s);
  if (steps > 0) {
    fetch(0);
    put(0);
  }
  const int warp_row = warp_id() % 2 * 32, warp_column = warp_id() / 2 * 16 * TILES;
  VK_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    sync_block();  // the stage is there for all, and all are done with the one before
    load(step + STAGES - 1);
    const bool more = step + 1 < steps;
    if (more) fetch(step + 1);
    if (more && !C::HALF) put(step + 1);  // wide sums leave no registers to hold the mask in
    const T* left = stages + step % STAGES * S::STAGE;
    const T* right = left + S::MASK + warp_column;
    left += TRANSPOSED ? warp_row : warp_row * S::LD_MASK;
    VK_UNROLL
    for (int k = 0; k < DEPTH; k += 16)
      multiply_step<!TRANSPOSED, false, S::LD_MASK, C::LD_COLUMNS, T, TILES>(
          sums, left + (TRANSPOSED ? k * S::LD_MASK : k), right + k * C::LD_COLUMNS, (1 << TILES) - 1);
    if (more && C::HALF) put(step + 1);
  }
  sync_block();  // the results take the place of the stages
  store_results<T, T>(sums, to, batch, row, rows, column);
}

template <bool TRANSPOSED, class T, class M>
void launch_merge(const Mask<T, M>& mask, const Operand<T>& first, const Operand<T>& second, int64_t batch,
                  Stream stream) {
  const auto tiles = [](const Operand<T>& operand) {
    return operand.to.data == nullptr ? 0 : ceil_div(operand.to.columns, COLUMNS);
  };
  MergeProblem<T, M> p{mask,         first,
                       second,       ceil_div(TRANSPOSED ? mask.merged : mask.tokens, ROWS),
                       tiles(first), tiles(first) + tiles(second)};
  const int64_t blocks = batch * p.row_tiles * p.tiles;
  if (blocks == 0) return;
  if constexpr (Config<T>::HALF) {
    if (suits_warpgroups(p))
      return launch(warpgroup_merge_kernel<TRANSPOSED, T, M, MergeProblem<T, M>>, Dim3{blocks}, THREADS,
                    WarpgroupShape::SHARED, stream, p);
  }
  launch(merge_kernel<TRANSPOSED, T, M>, Dim3{blocks}, THREADS, MergeShape<T, TRANSPOSED>::SHARED, stream, p);
}

}  // namespace vitkernels::learnable_token_merge
