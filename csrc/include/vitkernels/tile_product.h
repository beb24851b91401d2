// A block's product of a matrix in shared memory with one that streams in from global memory, on tensor
// cores.
//
// out[m][n] = sum_k a[m][k] w[n][k] (BY_ROWS: a layer's forward, w being its weight), or sum_k a[m][k]
// w[k][n] (its backward). a stays where it is; w arrives in tiles of `columns` n by `depth` k through two
// buffers, the next tile by cp.async while the current one is multiplied: one barrier a tile. A warp owns 32
// x 32 sums, so that four ldmatrix feed eight mma: the two pipes are balanced, and each fragment of w serves
// two of a.
#pragma once
#include "vitkernels/chunk_order.h"
#include "vitkernels/tile_attention_engine.h"

namespace vitkernels::tile_attention {

// Row-major or any strides; converted on the way in when it is of type Acc rather than T.
struct Weights {
  const void* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
  int rows = 0, columns = 0;  // multiples of 16
  bool wide = false;
};

constexpr int PRODUCT_COLUMNS = 32;  // of a warp's sums; its rows are as many

struct ProductTile {
  int column_bits = 0, depth_bits = 0;  // powers of two, so that a thread finds its share without a division
  int elements = 0;
  int buffers = 0;  // byte offset of the two

  VK_HOST_DEVICE int columns() const { return 1 << column_bits; }
  VK_HOST_DEVICE int depth() const { return 1 << depth_bits; }

  // The widest tile for which every warp has a block of sums of its own, or less where less exists; its depth
  // is 32 or 64.
  static ProductTile choose(int rows, int warps, int widest, int depth) {
    ProductTile tile;
    const int row_blocks = (rows + 31) / 32;
    tile.column_bits = 5;
    while ((2 << tile.column_bits) / PRODUCT_COLUMNS * row_blocks <= warps && tile.columns() < widest)
      ++tile.column_bits;
    tile.depth_bits = depth == 64 ? 6 : 5;
    const int by_rows = tile.columns() * (depth + 8), by_columns = depth * (tile.columns() + 8);
    tile.elements = by_rows > by_columns ? by_rows : by_columns;
    return tile;
  }
};

template <class T>
class Product {
 public:
  VK_DEVICE Product(const ProductTile& tile, char* shared)
      : tile_(tile), buffers_(reinterpret_cast<T*>(shared + tile.buffers)) {}

  // Asks for the first tile of `w`. Whatever else is in flight lands with it.
  template <bool BY_ROWS>
  VK_DEVICE void start(const Weights& w) const {
    stage<BY_ROWS>(w, 0, 0, turn_);
    cp_async_commit();
  }

  // Multiplies: a is [rows][lda], rows a multiple of 16 and at most 32 x warps. Begins with a barrier, so a
  // may have been written just before. Each warp hands its sums, two neighbours at a time, to store(row, n,
  // column, first, second), theirs being columns n + column and the next; when the block of columns from n on
  // is through, all threads call after(n, columns), which has to begin with a barrier if it needs one.
  template <bool BY_ROWS, class Store, class After>
  VK_DEVICE void run(const T* a, int lda, int rows, const Weights& w, Store store, After after) {
    const int count = BY_ROWS ? w.rows : w.columns, depth = BY_ROWS ? w.columns : w.rows;
    const int row_blocks = (rows + 31) / 32;
    const int row = warp_id() % row_blocks * 32, column = warp_id() / row_blocks * PRODUCT_COLUMNS;
    const bool second = row + 16 < rows;
    VK_NO_UNROLL
    for (int n = 0; n < count; n += tile_.columns()) {
      const int here = count - n < tile_.columns() ? count - n : tile_.columns();
      const int blocks = (here - column) / 8;  // of this warp, none when not positive
      float sums[2][4][4];
      clear(sums[0]);
      clear(sums[1]);
      VK_NO_UNROLL
      for (int k = 0; k < depth; k += tile_.depth()) {
        cp_async_wait<0>();
        sync_block();  // the tile is there for all, and all are done with the other buffer
        const int next_k = k + tile_.depth() < depth ? k + tile_.depth() : 0;
        const int next_n = next_k == 0 ? n + tile_.columns() : n;
        if (next_n < count) {
          stage<BY_ROWS>(w, next_n, next_k, turn_ + 1);
          cp_async_commit();
        }
        const int steps = depth - k < tile_.depth() ? depth - k : tile_.depth();
        const T* tile = buffers_ + (turn_ & 1) * tile_.elements;
        if (blocks > 0) multiply<BY_ROWS>(sums, a + row * lda + k, lda, tile, column, steps, blocks, second);
        ++turn_;
      }
      const int g = lane_id() / 4, t = lane_id() % 4;
      VK_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (half == 1 && !second) break;
        VK_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (j >= blocks) break;
          const auto& s = sums[half][j];
          const int r = row + 16 * half + g, c = column + 8 * j + 2 * t;
          store(r, n, c, s[0], s[1]);
          store(r + 8, n, c, s[2], s[3]);
        }
      }
      after(n, here);
    }
  }

 private:
  template <bool BY_ROWS>
  VK_DEVICE void multiply(float (&sums)[2][4][4], const T* a, int lda, const T* tile, int column, int steps,
                          int blocks, bool second) const {
    const int lane = lane_id(), ld = (BY_ROWS ? tile_.depth() : tile_.columns()) + 8;
    a += (lane & 15) * lda + (lane >> 4) * 8;
    tile += BY_ROWS ? (column + (lane & 7) + (lane >> 4) * 8) * ld + ((lane >> 3) & 1) * 8
                    : (lane & 15) * ld + column + (lane >> 4) * 8;
    VK_NO_UNROLL
    for (int k = 0; k < steps; k += 16) {
      uint32_t left[2][4];
      ldmatrix_x4(left[0], a + k);
      if (second) ldmatrix_x4(left[1], a + 16 * lda + k);
      VK_UNROLL
      for (int j = 0; j < 4; j += 2) {
        if (j >= blocks) break;
        uint32_t right[4];
        if constexpr (BY_ROWS) {
          ldmatrix_x4(right, tile + j * 8 * ld + k);
        } else {
          ldmatrix_x4_trans(right, tile + k * ld + j * 8);
        }
        mma_m16n8k16<T>(sums[0][j], left[0], {right[0], right[1]});
        mma_m16n8k16<T>(sums[0][j + 1], left[0], {right[2], right[3]});
        if (second) {
          mma_m16n8k16<T>(sums[1][j], left[1], {right[0], right[1]});
          mma_m16n8k16<T>(sums[1][j + 1], left[1], {right[2], right[3]});
        }
      }
    }
  }

  // n columns of w from n, k values from k, in the order in which they lie in w.
  template <bool BY_ROWS>
  VK_DEVICE void stage(const Weights& w, int n, int k, int turn) const {
    const int bits = (BY_ROWS ? tile_.depth_bits : tile_.column_bits) - 3, ld = (8 << bits) + 8;
    const int first_row = BY_ROWS ? n : k, first_column = BY_ROWS ? k : n;
    const int tile_rows = BY_ROWS ? tile_.columns() : tile_.depth();
    const int rows = w.rows - first_row < tile_rows ? w.rows - first_row : tile_rows;
    const auto order = ChunkOrder::of(bits);
    const int column = order.chunk(thread_x()) * 8;
    if (first_column + column >= w.columns) return;
    const bool vectorized = !w.wide && w.column_stride == 1 && w.row_stride % 8 == 0 &&
                            reinterpret_cast<uintptr_t>(w.data) % 16 == 0;
    const int first = order.row(thread_x()), step = block_dim_x() >> bits;
    int64_t source = (first_row + first) * w.row_stride + (first_column + column) * w.column_stride;
    T* target = buffers_ + (turn & 1) * tile_.elements + first * ld + column;
    VK_NO_UNROLL
    for (int row = first; row < rows; row += step, source += step * w.row_stride, target += step * ld) {
      if (vectorized) {
        cp_async16(target, static_cast<const T*>(w.data) + source);
        continue;
      }
      Vec<T, 8> values;
      VK_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int64_t at = source + e * w.column_stride;
        values[e] =
            w.wide ? from_float<T>(static_cast<const float*>(w.data)[at]) : static_cast<const T*>(w.data)[at];
      }
      values.store(target);
    }
  }

  ProductTile tile_;
  T* buffers_;
  int turn_ = 0;  // tiles multiplied so far; its last bit names the buffer
};

}  // namespace vitkernels::tile_attention
