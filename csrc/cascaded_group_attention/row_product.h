// A block's product of rows in shared memory with a weight that the warps read from global memory straight
// into registers: out[m][n] = sum_k rows[m][k] w[n][k].
//
// Made for latency: a weight passes through no shared memory and waits for no barrier, blocks of it are in
// flight per warp while an earlier one is multiplied. An mma may number the values of k as it likes, as
// long as both sides agree. So lane t of four takes the eight values 8t .. 8t + 7 of a block of 32, 16 bytes
// of either side: the left operands of two mma are two 16-byte loads, and so is the right one, whose sectors
// are read whole.
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

// Rows of channels in shared memory. A pitch of 64 bytes modulo 128, and chunks of 16 bytes that trade places
// within their 64 by the row: eight lanes meet no bank twice, be they two rows of four chunks (the operands
// here), eight rows of one chunk, or eight rows of four channels (sums of an mma).
template <class T>
struct Rows {
  T* data;
  int ld;

  static VK_HOST_DEVICE int leading_dimension(int channels) {
    const int padded = round_up(channels, 32);
    return padded % 64 == 0 ? padded + 32 : padded;
  }
  VK_DEVICE T* at(int row, int channel) const {
    return data + row * ld + ((channel >> 3) ^ ((row >> 1) & 3)) * 8 + (channel & 7);
  }
};

// A warp makes 16 M rows by 8 N columns at a time: finish(row, column, sums) with the first of each and the
// sums as mma_m16n8k16 leaves them; rows beyond `rows`, a multiple of 16, and columns beyond w.rows are none.
template <class T, int M, int N, int AHEAD, class Finish>
VK_DEVICE void multiply_rows(const Rows<T>& rows, int first_channel, int row_count, const DenseWeights<T>& w,
                             Finish finish) {
  const int g = lane_id() / 4, t = lane_id() % 4, depth = w.columns;
  const int64_t step = w.row_stride * 8 * static_cast<int64_t>(sizeof(T));
  int row = 0, column = warp_id() * 8 * N;
  VK_NO_UNROLL
  for (;; column += block_dim_x() / 32 * 8 * N) {
    const int padded = (w.rows + 8 * N - 1) / (8 * N) * (8 * N);
    while (column >= padded && row < row_count) {
      column -= padded;
      row += 16 * M;
    }
    if (row >= row_count) return;
    const auto* source = reinterpret_cast<const char*>(w.data + (column + g) * w.row_stride + 8 * t);
    const T* left = rows.data + (row + g) * rows.ld;
    const int turn = ((row + g) >> 1) & 3, chunk = first_channel / 8 + t;
    Vec<uint32_t, 4> right[AHEAD][N];
    const auto fetch = [&](Vec<uint32_t, 4>(&to)[N], int k) {
      VK_UNROLL
      for (int j = 0; j < N; ++j) {
        to[j] = Vec<uint32_t, 4>{{0, 0, 0, 0}};
        if (k + 8 * t < depth && column + 8 * j < w.rows)
          to[j] = Vec<uint32_t, 4>::load(
              reinterpret_cast<const uint32_t*>(source + j * step + k * static_cast<int>(sizeof(T))));
      }
    };
    VK_UNROLL
    for (int s = 0; s < AHEAD; ++s) fetch(right[s], 32 * s);
    float sums[M][N][4];
    VK_UNROLL
    for (int m = 0; m < M; ++m) tile_attention::clear(sums[m]);
    VK_NO_UNROLL
    for (int k0 = 0; k0 < depth; k0 += 32 * AHEAD) {
      VK_UNROLL
      for (int s = 0; s < AHEAD; ++s) {
        const int k = k0 + 32 * s;
        if (k >= depth) break;
        const int place = ((chunk + k / 8) ^ turn) * 8;
        VK_UNROLL
        for (int m = 0; m < M; ++m) {
          if (row + 16 * m >= row_count) break;
          Vec<uint32_t, 4> low{{0, 0, 0, 0}}, high{{0, 0, 0, 0}};
          if (k + 8 * t < depth) {
            low = Vec<uint32_t, 4>::load(reinterpret_cast<const uint32_t*>(left + 16 * m * rows.ld + place));
            high = Vec<uint32_t, 4>::load(
                reinterpret_cast<const uint32_t*>(left + (16 * m + 8) * rows.ld + place));
          }
          VK_UNROLL
          for (int j = 0; j < N; ++j) {
            const auto& b = right[s][j];
            mma_m16n8k16<T>(sums[m][j], {low[0], high[0], low[1], high[1]}, {b[0], b[1]});
          }
          VK_UNROLL
          for (int j = 0; j < N; ++j) {
            const auto& b = right[s][j];
            mma_m16n8k16<T>(sums[m][j], {low[2], high[2], low[3], high[3]}, {b[2], b[3]});
          }
        }
        fetch(right[s], k + 32 * AHEAD);
      }
    }
    finish(row, column, sums);
  }
}

}  // namespace vitkernels::cascaded_group_attention
