// The two engines of the tile-attention core. Both keep a 16 x 8n block of sums in the registers of a warp,
// in the layout of mma_m16n8k16: with g = lane / 4 and t = lane % 4, sums[j] holds rows g (two values) and g
// + 8 (two values) of columns 8j + 2t and the next. So whatever works on sums is written once for both.
#pragma once
#include "vitkernels/tile_attention_memory.h"

namespace vitkernels::tile_attention {

// f16 and bf16 operands, f32 sums.
template <class T_, int ROWS_>
struct TensorCores {
  using T = T_;
  using Acc = float;
  static constexpr int ROWS = ROWS_;
  static constexpr int SCRATCH = 0;  // elements a group needs for multiply_registers

  // sums += a b^T over `depth` channels (a multiple of 16): a is [16][lda], b is [8 TILES][ldb], of which
  // only the rows in `wanted` count.
  template <int TILES>
  static VK_DEVICE void multiply_rows(Acc (&sums)[TILES][4], const T* a, int lda, const T* b, int ldb,
                                      int depth, Span wanted) {
    const int lane = lane_id();
    a += (lane & 15) * lda + (lane >> 4) * 8;
    b += ((lane & 7) + (lane >> 4) * 8) * ldb + ((lane >> 3) & 1) * 8;
    VK_NO_UNROLL
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[4];
      ldmatrix_x4(left, a + k);
      VK_UNROLL
      for (int j = 0; j < TILES; j += 2) {
        if (8 * j + 16 <= wanted.begin || 8 * j >= wanted.end) continue;
        uint32_t right[4];
        ldmatrix_x4(right, b + j * 8 * ldb + k);
        mma_m16n8k16<T>(sums[j], left, {right[0], right[1]});
        mma_m16n8k16<T>(sums[j + 1], left, {right[2], right[3]});
      }
    }
  }

  // 16 rows of 16 channels as a left operand.
  static VK_DEVICE void load_rows(uint32_t (&left)[4], const T* a, int lda) {
    ldmatrix_x4(left, a + (lane_id() & 15) * lda + (lane_id() >> 4) * 8);
  }

  // multiply_rows() with left operands that are kept in registers: by the columns from 8 FIRST on.
  template <int FIRST, int COUNT, int TILES, int STEPS>
  static VK_DEVICE void multiply_kept(Acc (&sums)[TILES][4], const uint32_t (&left)[STEPS][4], const T* b,
                                      int ldb) {
    const int lane = lane_id();
    b += ((lane & 7) + (lane >> 4) * 8) * ldb + ((lane >> 3) & 1) * 8;
    VK_UNROLL
    for (int s = 0; s < STEPS; ++s) {
      VK_UNROLL
      for (int j = FIRST; j < FIRST + COUNT; j += 2) {
        uint32_t right[4];
        ldmatrix_x4(right, b + j * 8 * ldb + 16 * s);
        mma_m16n8k16<T>(sums[j], left[s], {right[0], right[1]});
        mma_m16n8k16<T>(sums[j + 1], left[s], {right[2], right[3]});
      }
    }
  }

  // sums += a b over ROWS: a is [16][lda], or [ROWS][lda] read by columns when TRANSPOSED; b is [ROWS][ldb].
  // Only the first `tiles` (even) blocks of 8 columns exist; outside `wanted` a is zero.
  template <bool TRANSPOSED, int TILES>
  static VK_DEVICE void multiply(Acc (&sums)[TILES][4], const T* a, int lda, const T* b, int ldb, int tiles,
                                 Span wanted) {
    const int lane = lane_id();
    if constexpr (TRANSPOSED) {
      a += ((lane & 7) + (lane >> 4) * 8) * lda + ((lane >> 3) & 1) * 8;
    } else {
      a += (lane & 15) * lda + (lane >> 4) * 8;
    }
    VK_NO_UNROLL
    for (int k = wanted.begin / 16 * 16; k < wanted.end; k += 16) {
      uint32_t left[4];
      if constexpr (TRANSPOSED) {
        ldmatrix_x4_trans(left, a + k * lda);
      } else {
        ldmatrix_x4(left, a + k);
      }
      step(sums, left, b + k * ldb, ldb, tiles);
    }
  }

  // sums += p b for 16 rows of probabilities that are still in registers: the layout of sums is that of the
  // left operand, so nothing moves.
  template <int TILES>
  static VK_DEVICE void multiply_registers(Acc (&sums)[TILES][4], const Acc (&p)[ROWS / 8][4], T*, const T* b,
                                           int ldb, int tiles, Span wanted) {
    VK_UNROLL
    for (int k = 0; k < ROWS; k += 16) {
      if (k + 16 <= wanted.begin || k >= wanted.end) continue;
      multiply_registers(sums, p[k / 8], p[k / 8 + 1], b + k * ldb, ldb, tiles);
    }
  }
  // The same of 16 columns of p.
  template <int TILES>
  static VK_DEVICE void multiply_registers(Acc (&sums)[TILES][4], const Acc (&low)[4], const Acc (&high)[4],
                                           const T* b, int ldb, int tiles) {
    const uint32_t left[4] = {pack2<T>(low[0], low[1]), pack2<T>(low[2], low[3]), pack2<T>(high[0], high[1]),
                              pack2<T>(high[2], high[3])};
    step(sums, left, b, ldb, tiles);
  }

 private:
  template <int TILES>
  static VK_DEVICE void step(Acc (&sums)[TILES][4], const uint32_t (&left)[4], const T* b, int ldb,
                             int tiles) {
    const int lane = lane_id();
    b += (lane & 15) * ldb + (lane >> 4) * 8;
    VK_UNROLL
    for (int j = 0; j < TILES; j += 2) {
      if (j >= tiles) break;
      uint32_t right[4];
      ldmatrix_x4_trans(right, b + j * 8);
      mma_m16n8k16<T>(sums[j], left, {right[0], right[1]});
      mma_m16n8k16<T>(sums[j + 1], left, {right[2], right[3]});
    }
  }
};

// Whether a few terms are added up before they join a sum, as matrix libraries do in larger parts: one chain
// over all of them would err twice as much. In double the registers do not hold them.
template <class T>
constexpr bool IN_PARTS = std::is_same_v<T, float>;

// float and double by fused multiply-adds; the same functions.
template <class T_, int ROWS_>
struct Plain {
  using T = T_;
  using Acc = T_;
  static constexpr int ROWS = ROWS_;
  static constexpr int LD = ROWS + static_cast<int>(16 / sizeof(T));
  static constexpr int SCRATCH = ROWS * LD;

  template <int TILES>
  static VK_DEVICE void multiply_rows(Acc (&sums)[TILES][4], const T* a, int lda, const T* b, int ldb,
                                      int depth, Span wanted) {
    constexpr int WIDTH = 16 / sizeof(T);
    const int g = lane_id() / 4, t = lane_id() % 4;
    a += g * lda;
    b += 2 * t * ldb;
    VK_NO_UNROLL
    for (int k = 0; k < depth; k += WIDTH) {
      const auto a0 = Vec<T, WIDTH>::load(a + k);
      const auto a1 = Vec<T, WIDTH>::load(a + 8 * lda + k);
      VK_UNROLL
      for (int j = 0; j < TILES; ++j) {
        if (8 * j + 8 <= wanted.begin || 8 * j >= wanted.end) continue;
        const auto b0 = Vec<T, WIDTH>::load(b + 8 * j * ldb + k);
        const auto b1 = Vec<T, WIDTH>::load(b + (8 * j + 1) * ldb + k);
        Acc part[4];
        VK_UNROLL
        for (int c = 0; c < 4; ++c) part[c] = IN_PARTS<T> ? Acc(0) : sums[j][c];
        VK_UNROLL
        for (int e = 0; e < WIDTH; ++e) {
          part[0] += a0[e] * b0[e];
          part[1] += a0[e] * b1[e];
          part[2] += a1[e] * b0[e];
          part[3] += a1[e] * b1[e];
        }
        VK_UNROLL
        for (int c = 0; c < 4; ++c) sums[j][c] = IN_PARTS<T> ? sums[j][c] + part[c] : part[c];
      }
    }
  }

  template <bool TRANSPOSED, int TILES>
  static VK_DEVICE void multiply(Acc (&sums)[TILES][4], const T* a, int lda, const T* b, int ldb, int tiles,
                                 Span wanted) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const int row_stride = TRANSPOSED ? 1 : lda, depth_stride = TRANSPOSED ? lda : 1;
    a += g * row_stride;
    b += 2 * t;
    constexpr int TERMS = IN_PARTS<T> ? 4 : 1;
    VK_NO_UNROLL
    for (int k = wanted.begin; k < wanted.end; k += TERMS) {
      const int terms = wanted.end - k;
      T a0[TERMS], a1[TERMS];
      VK_UNROLL
      for (int e = 0; e < TERMS; ++e) {
        if (e >= terms) break;
        a0[e] = a[(k + e) * depth_stride];
        a1[e] = a[(k + e) * depth_stride + 8 * row_stride];
      }
      VK_UNROLL
      for (int j = 0; j < TILES; ++j) {
        if (j >= tiles) break;
        Acc part[4];
        VK_UNROLL
        for (int c = 0; c < 4; ++c) part[c] = IN_PARTS<T> ? Acc(0) : sums[j][c];
        VK_UNROLL
        for (int e = 0; e < TERMS; ++e) {
          if (e >= terms) break;
          const auto right = Vec<T, 2>::load(b + (k + e) * ldb + 8 * j);
          part[0] += a0[e] * right[0];
          part[1] += a0[e] * right[1];
          part[2] += a1[e] * right[0];
          part[3] += a1[e] * right[1];
        }
        VK_UNROLL
        for (int c = 0; c < 4; ++c) sums[j][c] = IN_PARTS<T> ? sums[j][c] + part[c] : part[c];
      }
    }
  }

  // `scratch`: this warp's 16 rows of the group's SCRATCH elements.
  template <int TILES>
  static VK_DEVICE void multiply_registers(Acc (&sums)[TILES][4], const Acc (&p)[ROWS / 8][4], T* scratch,
                                           const T* b, int ldb, int tiles, Span wanted) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    VK_UNROLL
    for (int j = 0; j < ROWS / 8; ++j) {
      Vec<T, 2>{{p[j][0], p[j][1]}}.store(scratch + g * LD + 8 * j + 2 * t);
      Vec<T, 2>{{p[j][2], p[j][3]}}.store(scratch + (g + 8) * LD + 8 * j + 2 * t);
    }
    sync_warp();
    multiply<false>(sums, scratch, LD, b, ldb, tiles, wanted);
    sync_warp();
  }
};

template <class T, int ROWS>
using Engine = std::conditional_t<std::is_floating_point_v<T>, Plain<T, ROWS>, TensorCores<T, ROWS>>;

// Two sums that lie side by side, rounded to T, of which `count` exist: together where that is aligned, since
// four lanes then fill a sector of global memory, or half of one, at once.
template <class T>
VK_DEVICE void store_pair(T* to, accumulate_t<T> first, accumulate_t<T> second, int count) {
  if (count >= 2 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0) {
    Vec<T, 2>{{from_accumulate<T>(first), from_accumulate<T>(second)}}.store(to);
    return;
  }
  if (count >= 1) to[0] = from_accumulate<T>(first);
  if (count >= 2) to[1] = from_accumulate<T>(second);
}

// 16 rows of sums, each times its factor, rounded to T, to shared memory.
template <class T, class Acc, int TILES>
VK_DEVICE void write_sums(T* tile, int ld, const Acc (&sums)[TILES][4], int tiles, Acc factor0, Acc factor1) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  T* low = tile + g * ld + 2 * t;
  T* high = low + 8 * ld;
  VK_UNROLL
  for (int j = 0; j < TILES; ++j) {
    if (j >= tiles) break;
    const auto& s = sums[j];
    Vec<T, 2>{{from_accumulate<T>(s[0] * factor0), from_accumulate<T>(s[1] * factor0)}}.store(low + 8 * j);
    Vec<T, 2>{{from_accumulate<T>(s[2] * factor1), from_accumulate<T>(s[3] * factor1)}}.store(high + 8 * j);
  }
}

// The same to global memory, through rows of shared memory that only this warp uses: along whichever
// dimension is dense there. target() makes the Matrix once the sums have left the registers that its
// addresses take.
template <class T, class Acc, int TILES, class Target, class Token>
VK_DEVICE void write_rows(T* rows, int ld, int bits, const Acc (&sums)[TILES][4], int tiles, Acc factor0,
                          Acc factor1, bool wide, const Target& target, const Token& token) {
  write_sums(rows, ld, sums, tiles, factor0, factor1);
  sync_warp();
  if (wide)
    store_rows(target(), rows, ld, bits, token);
  else
    store_tile(target(), rows, ld, Group<16>(), token);
}

template <class Acc, int TILES>
VK_DEVICE void clear(Acc (&sums)[TILES][4]) {
  VK_UNROLL
  for (int j = 0; j < TILES; ++j) {
    VK_UNROLL
    for (int c = 0; c < 4; ++c) sums[j][c] = Acc(0);
  }
}

}  // namespace vitkernels::tile_attention
