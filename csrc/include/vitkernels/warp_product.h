// A warp's part of a matrix product: 32 rows by 16 TILES columns, from tiles in shared memory.
//
// Tensor cores for f16 and bf16, fused multiply-adds for f32 and f64. Four ldmatrix at TILES = 2 feed eight
// mma, ten at 8 feed thirty-two: the wider, the less shared memory is read for a product.
#pragma once
#include "vitkernels/device.h"

namespace vitkernels {

// In the layout of mma_m16n8k16: with g = lane / 4, t = lane % 4, sums[half][i][j] holds rows 16 half + g
// (two values) and + 8 (two values) of columns 16 i + 8 j + 2 t and the next.
template <class T, int TILES>
using WarpSums = accumulate_t<T>[2][TILES][2][4];

template <class T, int TILES>
VK_DEVICE void clear_sums(WarpSums<T, TILES>& sums) {
  VK_UNROLL
  for (int half = 0; half < 2; ++half) {
    VK_UNROLL
    for (int i = 0; i < TILES; ++i) {
      VK_UNROLL
      for (int c = 0; c < 8; ++c) sums[half][i][c / 4][c % 4] = accumulate_t<T>(0);
    }
  }
}

// sums += a b over 16 features. a is [32][LDA] with A_BY_ROWS, else [16][LDA], its rows side by side; b is
// [16 TILES][LDB] with B_BY_ROWS (a row for each column of the sums), else [16][LDB]. Only those tiles of
// columns count whose bit is set in mask.
template <bool A_BY_ROWS, bool B_BY_ROWS, int LDA, int LDB, class T, int TILES>
VK_DEVICE void multiply_step(WarpSums<T, TILES>& sums, const T* a, const T* b, int mask) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    uint32_t left[2][4];
    if constexpr (A_BY_ROWS) {
      a += (lane & 15) * LDA + (lane >> 4) * 8;
      ldmatrix_x4(left[0], a);
      ldmatrix_x4(left[1], a + 16 * LDA);
    } else {
      a += ((lane & 7) + (lane >> 4) * 8) * LDA + ((lane >> 3) & 1) * 8;
      ldmatrix_x4_trans(left[0], a);
      ldmatrix_x4_trans(left[1], a + 16);
    }
    b += B_BY_ROWS ? ((lane & 7) + (lane >> 4) * 8) * LDB + ((lane >> 3) & 1) * 8
                   : (lane & 15) * LDB + (lane >> 4) * 8;
    VK_UNROLL
    for (int i = 0; i < TILES; ++i) {
      if ((mask >> i & 1) == 0) continue;
      uint32_t right[4];
      if constexpr (B_BY_ROWS) {
        ldmatrix_x4(right, b + 16 * i * LDB);
      } else {
        ldmatrix_x4_trans(right, b + 16 * i);
      }
      VK_UNROLL
      for (int half = 0; half < 2; ++half) {
        mma_m16n8k16<T>(sums[half][i][0], left[half], {right[0], right[1]});
        mma_m16n8k16<T>(sums[half][i][1], left[half], {right[2], right[3]});
      }
    }
  } else {
    constexpr int WIDTH = 16 / sizeof(T);
    const int g = lane / 4, t = lane % 4;
    a += A_BY_ROWS ? g * LDA : g;
    VK_NO_UNROLL
    for (int k = 0; k < 16; k += WIDTH) {
      Vec<T, WIDTH> left[4];
      VK_UNROLL
      for (int r = 0; r < 4; ++r) {
        if constexpr (A_BY_ROWS) {
          left[r] = Vec<T, WIDTH>::load(a + 8 * r * LDA + k);
        } else {
          VK_UNROLL
          for (int e = 0; e < WIDTH; ++e) left[r][e] = a[(k + e) * LDA + 8 * r];
        }
      }
      VK_UNROLL
      for (int i = 0; i < TILES; ++i) {
        if ((mask >> i & 1) == 0) continue;
        VK_UNROLL
        for (int j = 0; j < 2; ++j) {
          T right[2][WIDTH];
          const int column = 16 * i + 8 * j + 2 * t;
          if constexpr (B_BY_ROWS) {
            VK_UNROLL
            for (int c = 0; c < 2; ++c) {
              const auto values = Vec<T, WIDTH>::load(b + (column + c) * LDB + k);
              VK_UNROLL
              for (int e = 0; e < WIDTH; ++e) right[c][e] = values[e];
            }
          } else {
            VK_UNROLL
            for (int e = 0; e < WIDTH; ++e) {
              const auto values = Vec<T, 2>::load(b + (k + e) * LDB + column);
              right[0][e] = values[0];
              right[1][e] = values[1];
            }
          }
          // A few terms join the sums together: one chain over all of them would err twice as much.
          VK_UNROLL
          for (int r = 0; r < 4; ++r) {
            VK_UNROLL
            for (int c = 0; c < 2; ++c) {
              T part = T(0);
              VK_UNROLL
              for (int e = 0; e < WIDTH; ++e) part += left[r][e] * right[c][e];
              sums[r / 2][i][j][r % 2 * 2 + c] += part;
            }
          }
        }
      }
    }
  }
}

}  // namespace vitkernels
