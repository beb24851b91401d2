// A block's product of rows in shared memory with a weight that the warps read from global memory straight
// into registers: out[m][n] = sum_k rows[m][k] w[n][k].
//
// Made for latency: a weight passes through no shared memory and waits for no barrier, blocks of it are in
// flight per warp while an earlier one is multiplied. An mma may number the values of k as it likes, as long
// as both sides agree. So lane t of four takes the eight values 8t .. 8t + 7 of a block of 32 of the weight,
// whose sectors are read whole, and the rows lie so in shared memory that ldmatrix hands it the same.
#pragma once
#include "problem.h"

namespace vitkernels::cascaded_group_attention {

// Neighbours along k lie side by side, rows and data are aligned to 16 bytes. Rows and columns are multiples
// of 16.
template <class T>
struct DenseWeights {
  const T* data;
  int64_t row_stride;
  int rows, columns;
};

// Rows of channels in shared memory, in blocks of 32: `parts` of `depth` channels (a multiple of 16), each
// with `blocks` of its own. Quarter q of a block, 16 bytes, holds the channels 8i + 2q and 8i + 2q + 1 of
// every i: as the right operand wants them, and as a lane's sums of four tiles lie. A pitch of 64 bytes
// modulo 128 and quarters that trade places by the row: eight lanes meet no bank twice, be they eight rows of
// a quarter (ldmatrix) or two rows of four (sums).
template <class T>
struct Rows {
  T* data;
  int ld, depth, blocks;

  static VK_HOST_DEVICE int leading_dimension(int all_blocks) { return 32 * (all_blocks | 1); }
  VK_DEVICE T* quarter(int row, int block, int q) const {
    return data + row * ld + 32 * block + (q ^ ((row >> 1) & 3)) * 8;
  }
};

// A warp makes `down` rows, of at most 16 M, by 8 N columns at a time: finish(row, last_row, column, sums)
// with the first of each and the sums as mma_m16n8k16 leaves them; rows beyond last_row, a multiple of 16 as
// `down` and row_count, and columns beyond w.rows are none. The columns of w are those of `parts` parts from
// `first_part` on.
template <class T, int M, int N, int AHEAD, class Finish>
VK_DEVICE void multiply_rows(const Rows<T>& rows, int first_part, int parts, const Divisor& by_blocks,
                             int row_count, int down, const DenseWeights<T>& w, Finish finish) {
  const int g = lane_id() / 4, t = lane_id() % 4, padding = 32 * rows.blocks - rows.depth;
  const int blocks = parts * rows.blocks;
  const int64_t step = w.row_stride * 8 * static_cast<int64_t>(sizeof(T));
  int row = 0, column = warp_id() * 8 * N;
  VK_NO_UNROLL
  for (;; column += block_dim_x() / 32 * 8 * N) {
    const int padded = (w.rows + 8 * N - 1) / (8 * N) * (8 * N);
    while (column >= padded && row < row_count) {
      column -= padded;
      row += down;
    }
    if (row >= row_count) return;
    const int last_row = row + down < row_count ? row + down : row_count;
    const auto* source = reinterpret_cast<const char*>(w.data + (column + g) * w.row_stride + 8 * t);
    const T* left = rows.quarter(row + (lane_id() & 15), first_part * rows.blocks, lane_id() >> 4);
    // Quarters 0 and 2, 1 and 3 trade places by this bit of the row.
    const int half = ((row + (lane_id() & 15)) & 4) != 0 ? -16 : 16;
    Vec<uint32_t, 4> right[AHEAD][N];
    const auto fetch = [&](Vec<uint32_t, 4>(&to)[N], int block) {
      const int part = by_blocks.divide(block), k = 32 * block - part * padding;
      const bool exists = block < blocks && k + 8 * t < (part + 1) * rows.depth;
      VK_UNROLL
      for (int j = 0; j < N; ++j) {
        to[j] = Vec<uint32_t, 4>{{0, 0, 0, 0}};
        if (exists && column + 8 * j < w.rows)
          to[j] = Vec<uint32_t, 4>::load(
              reinterpret_cast<const uint32_t*>(source + j * step + k * static_cast<int>(sizeof(T))));
      }
    };
    VK_UNROLL
    for (int s = 0; s < AHEAD; ++s) fetch(right[s], s);
    float sums[M][N][4];
    VK_UNROLL
    for (int m = 0; m < M; ++m) tile_attention::clear(sums[m]);
    VK_NO_UNROLL
    for (int first = 0; first < blocks; first += AHEAD) {
      VK_UNROLL
      for (int s = 0; s < AHEAD; ++s) {
        const int block = first + s;
        if (block >= blocks) break;
        VK_UNROLL
        for (int m = 0; m < M; ++m) {
          if (row + 16 * m >= last_row) break;
          uint32_t low[4], high[4];
          ldmatrix_x4(low, left + 16 * m * rows.ld + 32 * block);
          ldmatrix_x4(high, left + half + 16 * m * rows.ld + 32 * block);
          VK_UNROLL
          for (int j = 0; j < N; ++j) mma_m16n8k16<T>(sums[m][j], low, {right[s][j][0], right[s][j][1]});
          VK_UNROLL
          for (int j = 0; j < N; ++j) mma_m16n8k16<T>(sums[m][j], high, {right[s][j][2], right[s][j][3]});
        }
        fetch(right[s], block + AHEAD);
      }
    }
    finish(row, last_row, column, sums);
  }
}

}  // namespace vitkernels::cascaded_group_attention
