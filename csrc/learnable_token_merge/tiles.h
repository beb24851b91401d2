// What the products of learnable token merging share: the mask normalised on its way into shared memory,
// tiles of tokens, and results on their way out.
#pragma once
#include <type_traits>

#include "learnable_token_merge.h"
#include "vitkernels/chunk_order.h"
#include "vitkernels/tile_attention_engine.h"
#include "vitkernels/warp_product.h"

namespace vitkernels::learnable_token_merge {

// A block of threads makes ROWS x COLUMNS results, each warp 32 x 64 of them.
constexpr int ROWS = 64, COLUMNS = 128, TILES = 4, THREADS = 128;

template <class T>
struct Config {
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int PAD =
      static_cast<int>(16 / sizeof(T));         // keeps ldmatrix and vectors free of conflicts
  static constexpr int DEPTH = HALF ? 32 : 16;  // summed over in a stage of the pipeline
  static constexpr int STAGES = sizeof(T) == 8 ? 2 : 3;
  static constexpr int LD_DEPTH = DEPTH + PAD, LD_ROWS = ROWS + PAD, LD_COLUMNS = COLUMNS + PAD;
};

inline int ceil_div(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

// How the mask is normalised: an element less `shift`, exponentiated, over `divisor`, each of the element's
// row or column, where they are there. Half precision takes the logarithm of the sum of exponentials as the
// shift. In float and double its rounding would show, so that there are a maximum and a sum.
template <class T, class M>
struct Mask {
  using Acc = accumulate_t<T>;
  const M* g;
  int64_t batch_stride, row_stride, norm_stride;  // norm_stride: of shift and divisor, from mask to mask
  const Acc *shift, *divisor;
  int tokens, merged;
  bool pairs, by_rows;  // two neighbours are one aligned access; shift and divisor are those of rows

  VK_DEVICE Acc of_norm(const Acc* values, int64_t batch, int index) const {
    return values[batch * norm_stride + index];
  }
  // `over` is the divisor, in half precision its inverse.
  VK_DEVICE static Acc normalized(Acc value, const Acc* shift, const Acc* divisor, Acc minus, Acc over) {
    if (shift != nullptr) {
      if constexpr (Config<T>::HALF) {
        value = exp2_fast((value - minus) * LOG2E);
      } else {
        value = exp_(value - minus);
      }
    }
    if (divisor == nullptr) return value;
    return Config<T>::HALF ? value * over : value / over;
  }
};

// A tile [TALL][WIDE] of the mask: fetched while a product runs, put into shared memory after it. Lanes take
// neighbouring pairs of columns, since rows of the mask are seldom multiples of 16 bytes.
template <int TALL, int WIDE, class T, class M>
class MaskTile {
 public:
  VK_DEVICE void fetch(const Mask<T, M>& mask, int64_t batch, int token, int merged) {
    int thread = thread_x();
    forget(thread);  // lest what follows from it wait in registers for the next tile
    const int row = token + thread / PAIRS, column = merged + thread % PAIRS * 2;
    const int columns = mask.merged - column, rows = columns > 0 ? mask.tokens - row : 0;
    const M* at = mask.g + batch * mask.batch_stride + row * mask.row_stride + column;
    VK_UNROLL
    for (int i = 0; i < COUNT; ++i, at += STEP * mask.row_stride) {
      raw_[i] = {{from_float<M>(0.0f), from_float<M>(0.0f)}};
      if (i * STEP >= rows) continue;
      if (mask.pairs && columns > 1) {
        raw_[i] = Vec<M, 2>::load(at);
      } else {
        raw_[i][0] = at[0];
        if (columns > 1) raw_[i][1] = at[1];
      }
    }
  }

  // Two neighbours at place(row, column) of the tile. Exactly zero beyond the mask.
  template <class Place>
  VK_DEVICE void put(const Mask<T, M>& mask, int64_t batch, int token, int merged, Place place) const {
    using Acc = accumulate_t<T>;
    int thread = thread_x();
    forget(thread);
    const int first_row = thread / PAIRS, pair = thread % PAIRS * 2, column = merged + pair;
    const int rows = mask.tokens - token - first_row;
    const Acc *shift = mask.shift, *divisor = mask.divisor;
    Acc minus[2] = {Acc(0), Acc(0)}, over[2] = {Acc(1), Acc(1)};
    if (!mask.by_rows) {
      VK_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (column + e >= mask.merged) continue;
        if (shift != nullptr) minus[e] = mask.of_norm(shift, batch, column + e);
        if (divisor != nullptr) over[e] = mask.of_norm(divisor, batch, column + e);
        if (divisor != nullptr && Config<T>::HALF) over[e] = Acc(1) / over[e];
      }
    }
    const int64_t first_norm = batch * mask.norm_stride + token + first_row;
    VK_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      const bool exists = i * STEP < rows;
      if (mask.by_rows && exists) {
        if (shift != nullptr) minus[0] = minus[1] = shift[first_norm + i * STEP];
        if (divisor != nullptr) over[0] = over[1] = divisor[first_norm + i * STEP];
      }
      Vec<T, 2> values;
      VK_UNROLL
      for (int e = 0; e < 2; ++e) {
        const Acc value =
            Mask<T, M>::normalized(to_accumulate(raw_[i][e]), shift, divisor, minus[e], over[e]);
        values[e] = from_accumulate<T>(exists && column + e < mask.merged ? value : Acc(0));
      }
      values.store(place(first_row + i * STEP, pair));
    }
  }

 private:
  static constexpr int PAIRS = WIDE / 2, STEP = THREADS / PAIRS, COUNT = TALL / STEP;
  static_assert(STEP * PAIRS == THREADS && COUNT * STEP == TALL);

  Vec<M, 2> raw_[COUNT];
};

// A matrix for each batch entry, columns side by side; absent: zeros.
template <class T>
struct Matrices {
  T* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0;
  int columns = 0;
  bool vectors = false;  // 16-byte accesses are aligned and whole

  Matrices() = default;
  Matrices(const View& view, int64_t columns)
      : data(static_cast<T*>(view.data)),
        batch_stride(view.stride[0]),
        row_stride(view.stride[1]),
        columns(static_cast<int>(columns)) {
    constexpr int WIDTH = 16 / sizeof(T);
    vectors = reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch_stride % WIDTH == 0 &&
              row_stride % WIDTH == 0 && columns % WIDTH == 0;
  }
  VK_DEVICE T* at(int64_t batch, int64_t row, int column) const {
    return data + batch * batch_stride + row * row_stride + column;
  }
};

// tile[TALL][WIDE], ld apart, of a matrix from (row, column) on; zeros from row `end` and beyond the columns.
// Asynchronous where everything is aligned: call cp_async_commit() after it.
template <int TALL, int WIDE, class T>
VK_DEVICE void load_tile(T* tile, int ld, const Matrices<const T>& from, int64_t batch, int row, int end,
                         int column) {
  constexpr int WIDTH = 16 / sizeof(T), CHUNKS = WIDE / WIDTH, STEP = THREADS / CHUNKS;
  static_assert(STEP * CHUNKS == THREADS && TALL % STEP == 0 && (CHUNKS >= 8 || STEP % 8 == 0));
  const auto order = ChunkOrder::of(log2_of(CHUNKS));
  const int chunk = order.chunk(thread_x()) * WIDTH, count = from.columns - column - chunk;
  VK_UNROLL
  for (int inside = order.row(thread_x()); inside < TALL; inside += STEP) {
    T* to = tile + inside * ld + chunk;
    const bool valid = row + inside < end && count > 0;
    const T* at = valid ? from.at(batch, row + inside, column + chunk) : from.data;
    if (from.vectors) {
      cp_async16(to, at, valid);
      continue;
    }
    Vec<T, WIDTH> values;
    VK_UNROLL
    for (int e = 0; e < WIDTH; ++e) values[e] = valid && e < count ? at[e] : from_float<T>(0.0f);
    values.store(to);
  }
}

template <class T, class R>
constexpr size_t result_bytes() {
  return sizeof(R) * ROWS * (COLUMNS + 16 / sizeof(R));
}

// The block's results, through shared memory, so that 16 bytes go out at a time. All are done with the
// stages.
template <class T, class R>
VK_DEVICE void store_results(const WarpSums<T, TILES>& sums, const Matrices<R>& to, int64_t batch, int row,
                             int end, int column) {
  constexpr int WIDTH = 16 / sizeof(R), LD = COLUMNS + WIDTH, CHUNKS = COLUMNS / WIDTH;
  constexpr int STEP = THREADS / CHUNKS;
  R* tile = reinterpret_cast<R*>(shared_memory());
  const int g = lane_id() / 4, t = lane_id() % 4;
  R* mine = tile + (warp_id() % 2 * 32 + g) * LD + warp_id() / 2 * 16 * TILES + 2 * t;
  VK_UNROLL
  for (int half = 0; half < 2; ++half) {
    VK_UNROLL
    for (int i = 0; i < TILES; ++i) {
      VK_UNROLL
      for (int j = 0; j < 2; ++j) {
        const auto& s = sums[half][i][j];
        VK_UNROLL
        for (int r = 0; r < 2; ++r)
          Vec<R, 2>{{from_accumulate<R>(s[2 * r]), from_accumulate<R>(s[2 * r + 1])}}.store(
              mine + (16 * half + 8 * r) * LD + 16 * i + 8 * j);
      }
    }
  }
  sync_block();
  const int chunk = thread_x() % CHUNKS * WIDTH, count = to.columns - column - chunk;
  if (count <= 0) return;
  VK_NO_UNROLL
  for (int inside = thread_x() / CHUNKS; inside < ROWS && row + inside < end; inside += STEP) {
    const R* from = tile + inside * LD + chunk;
    R* at = to.at(batch, row + inside, column + chunk);
    if (to.vectors) {
      Vec<R, WIDTH>::load(from).store(at);
      continue;
    }
    VK_UNROLL
    for (int e = 0; e < WIDTH; ++e)
      if (e < count) at[e] = from[e];
  }
}

}  // namespace vitkernels::learnable_token_merge
