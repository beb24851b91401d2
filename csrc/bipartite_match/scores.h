// Scores of a block of even tokens with the odd ones, and the best of each row.
//
// A block of threads owns ROWS even tokens and runs over odd ones, COLUMNS at a time, by chunks of 128 bytes
// of channels through two buffers: the next chunk comes by cp.async while the current one is multiplied. Even
// tokens of up to two chunks are loaded once. Scores live in registers: of each row a thread keeps the
// largest product <a, b> / |b| it has met and its b; the norms of a chunk are summed from shared memory while
// it is there.
//
// ROWS x COLUMNS (128 x 128 with 16 bits) take 64 FLOPs for every byte from L2, 128 where the even tokens
// stay. A warp owns 32 rows, so that two ldmatrix of a serve all of b's and each of b's serves two of a.
#pragma once
#include "bipartite_match.h"
#include "vitkernels/device.h"
#include "vitkernels/tile_attention_engine.h"

namespace vitkernels::bipartite_match {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int SIDES = 2;                  // warps side by side, each half of the columns
constexpr int ROWS = 32 * WARPS / SIDES;  // even tokens of a block
constexpr int MULTIPROCESSORS = 132;      // of the GPU that a call should fill

template <class T>
struct Config {
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int WIDTH = static_cast<int>(16 / sizeof(T));
  static constexpr int DEPTH = 8 * WIDTH;     // channels of a chunk
  static constexpr int LD = DEPTH + WIDTH;    // 144 bytes: no bank conflicts for ldmatrix and 16-byte loads
  static constexpr int TILES = HALF ? 8 : 4;  // of eight columns, of a warp
  static constexpr int COLUMNS = 8 * TILES * SIDES;
  static constexpr int STEP = HALF ? 16 : WIDTH;         // channels multiplied at once
  static constexpr int BLOCKS = sizeof(T) == 8 ? 1 : 2;  // of threads on a multiprocessor, by registers
};

// What the tokens are, whatever their type.
struct Sizes {
  int64_t batch;
  int tokens, channels, merged;
  bool class_token, distill_token;

  explicit Sizes(const Params& p)
      : batch(p.batch),
        tokens(static_cast<int>(p.tokens)),
        channels(p.channels),
        merged(static_cast<int>(p.merged)),
        class_token(p.class_token),
        distill_token(p.distill_token) {}

  VK_HOST_DEVICE int evens() const { return (tokens + 1) / 2; }
  VK_HOST_DEVICE int odds() const { return tokens / 2; }
  VK_HOST_DEVICE int kept() const { return evens() - merged; }
  VK_HOST_DEVICE int first_odd() const { return distill_token ? 1 : 0; }  // the lowest that may be chosen
};

template <class T>
struct Problem : Sizes {
  const T* metric;
  int64_t image_stride, token_stride;
  bool vectors;  // 16-byte loads are aligned and whole

  explicit Problem(const Params& p)
      : Sizes(p),
        metric(static_cast<const T*>(p.metric.data)),
        image_stride(p.metric.stride[0]),
        token_stride(p.metric.stride[1]) {
    constexpr int WIDTH = Config<T>::WIDTH;
    vectors = reinterpret_cast<uintptr_t>(metric) % 16 == 0 && image_stride % WIDTH == 0 &&
              token_stride % WIDTH == 0 && channels % WIDTH == 0;
  }
};

// The best of a row, before the norm of its own token.
template <class Acc>
struct Best {
  Acc value;
  int odd;

  // Of equal values the lower odd token.
  VK_DEVICE void take(Acc other, int other_odd) {
    if (other > value || (other == value && other_odd < odd)) {
      value = other;
      odd = other_odd;
    }
  }
};

// Shared memory of the scores, in this order.
template <class T>
struct Tiles {
  using C = Config<T>;
  using Acc = accumulate_t<T>;
  static constexpr int EVEN = ROWS * C::LD, ODD = C::COLUMNS * C::LD;
  static constexpr size_t BYTES = sizeof(T) * 2 * (EVEN + ODD) + sizeof(Acc) * (C::COLUMNS + ROWS) +
                                  (sizeof(Acc) + sizeof(int)) * SIDES * ROWS;

  static_assert(BYTES < tile_attention::SHARED_LIMIT - 4096, "and what forward.cu adds");

  T *even, *odd;                    // two chunks each
  Acc *odd_inverse, *even_inverse;  // 1 / norm of the current columns, of the rows
  Acc* values;                      // [SIDES][ROWS] and their odd tokens
  int* odds;

  VK_DEVICE explicit Tiles(char* shared) {
    even = reinterpret_cast<T*>(shared);
    odd = even + 2 * EVEN;
    odd_inverse = reinterpret_cast<Acc*>(odd + 2 * ODD);
    even_inverse = odd_inverse + C::COLUMNS;
    values = even_inverse + ROWS;
    odds = reinterpret_cast<int*>(values + SIDES * ROWS);
  }

  // The best of row `thread_x()` < ROWS, after scores_of and a barrier.
  VK_DEVICE Best<Acc> best() const {
    Best<Acc> result{values[thread_x()], odds[thread_x()]};
    VK_UNROLL
    for (int side = 1; side < SIDES; ++side)
      result.take(values[side * ROWS + thread_x()], odds[side * ROWS + thread_x()]);
    return result;
  }
};

VK_DEVICE float sqrt_(float x) {
  return sqrtf(x);
}
VK_DEVICE double sqrt_(double x) {
  return sqrt(x);
}

// Channels from `channel` on of LINES tokens, every second one from `token` on, zeros beyond either end.
template <int LINES, class T>
VK_DEVICE void load_chunk(T* tile, const Problem<T>& p, const T* image, int token, int channel) {
  using C = Config<T>;
  constexpr int VECTORS = C::DEPTH / C::WIDTH;
  const int column = channel + thread_x() % VECTORS * C::WIDTH, count = p.channels - column;
  tile += thread_x() % VECTORS * C::WIDTH;
  VK_NO_UNROLL
  for (int line = thread_x() / VECTORS; line < LINES; line += THREADS / VECTORS) {
    const int which = token + 2 * line;
    const bool valid = which < p.tokens && count > 0;
    const T* from = valid ? image + which * p.token_stride + column : p.metric;
    if (p.vectors) {
      cp_async16(tile + line * C::LD, from, valid);
      continue;
    }
    Vec<T, C::WIDTH> values;
    VK_UNROLL
    for (int e = 0; e < C::WIDTH; ++e) values[e] = valid && e < count ? from[e] : from_float<T>(0.0f);
    values.store(tile + line * C::LD);
  }
}

// The squares of a chunk of LINES tokens: THREADS / LINES neighbouring threads share a line.
template <int LINES, class T>
VK_DEVICE accumulate_t<T> squares(const T* tile) {
  using C = Config<T>;
  constexpr int SHARE = THREADS / LINES, PART = C::DEPTH / SHARE;
  static_assert(PART % C::WIDTH == 0 && SHARE <= 32);
  tile += thread_x() / SHARE * C::LD + thread_x() % SHARE * PART;
  accumulate_t<T> sum = 0;
  VK_UNROLL
  for (int i = 0; i < PART; i += C::WIDTH) {
    const auto values = Vec<T, C::WIDTH>::load(tile + i);
    VK_UNROLL
    for (int e = 0; e < C::WIDTH; ++e) {
      const auto x = to_accumulate(values[e]);
      sum += x * x;
    }
  }
  return sum;
}

// 1 / norm from the sums of `squares`; a token of zeros counts as one of norm 1. Of lines other than begin ..
// end it is not a number, and so will be what is multiplied by it.
template <int LINES, class Acc>
VK_DEVICE void store_inverse(Acc* inverse, Acc sum, int begin, int end) {
  constexpr int SHARE = THREADS / LINES;
  const int line = thread_x() / SHARE;
  sum = warp_sum<SHARE>(sum);
  if (thread_x() % SHARE != 0) return;
  if (line < begin || line >= end) {
    inverse[line] = Acc(NAN);
  } else {
    inverse[line] = sum == Acc(0) ? Acc(1) : Acc(1) / sqrt_(sum);
  }
}

// The sums of a warp: two times 16 rows, TILES x 8 columns, in the layout of mma_m16n8k16.
template <class T>
using Sums = accumulate_t<T>[2][Config<T>::TILES][4];

// sums += a b^T over `depth` channels.
template <class T>
VK_DEVICE void multiply(Sums<T>& sums, const T* a, const T* b, int depth) {
  using C = Config<T>;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  if constexpr (C::HALF) {
    a += (lane & 15) * C::LD + (lane >> 4) * 8;
    b += ((lane & 7) + (lane >> 4) * 8) * C::LD + ((lane >> 3) & 1) * 8;
    VK_NO_UNROLL
    for (int k = 0; k < depth; k += 16) {
      uint32_t left[2][4];
      ldmatrix_x4(left[0], a + k);
      ldmatrix_x4(left[1], a + 16 * C::LD + k);
      VK_UNROLL
      for (int j = 0; j < C::TILES; j += 2) {
        uint32_t right[4];
        ldmatrix_x4(right, b + 8 * j * C::LD + k);
        VK_UNROLL
        for (int half = 0; half < 2; ++half) {
          mma_m16n8k16<T>(sums[half][j], left[half], {right[0], right[1]});
          mma_m16n8k16<T>(sums[half][j + 1], left[half], {right[2], right[3]});
        }
      }
    }
  } else {
    constexpr int WIDTH = C::WIDTH;
    a += g * C::LD;
    b += 2 * t * C::LD;
    VK_NO_UNROLL
    for (int k = 0; k < depth; k += WIDTH) {
      Vec<T, WIDTH> left[4];
      VK_UNROLL
      for (int r = 0; r < 4; ++r) left[r] = Vec<T, WIDTH>::load(a + 8 * r * C::LD + k);
      VK_UNROLL
      for (int j = 0; j < C::TILES; ++j) {
        const auto first = Vec<T, WIDTH>::load(b + 8 * j * C::LD + k);
        const auto second = Vec<T, WIDTH>::load(b + (8 * j + 1) * C::LD + k);
        VK_UNROLL
        for (int e = 0; e < WIDTH; ++e) {
          VK_UNROLL
          for (int r = 0; r < 4; ++r) {
            sums[r / 2][j][r % 2 * 2] += left[r][e] * first[e];
            sums[r / 2][j][r % 2 * 2 + 1] += left[r][e] * second[e];
          }
        }
      }
    }
  }
}

// The best of ROWS even tokens from `row` on among the odd tokens begin .. end, left in `tiles`: a barrier,
// then Tiles::best and even_inverse.
template <class T>
VK_DEVICE void scores_of(const Tiles<T>& tiles, const Problem<T>& p, int64_t of_image, int row, int begin,
                         int end) {
  using C = Config<T>;
  using Acc = accumulate_t<T>;
  const T* image = p.metric + of_image * p.image_stride;
  const int chunks = (p.channels + C::DEPTH - 1) / C::DEPTH;
  const bool resident = chunks <= 2;
  const int warp_row = warp_id() % (WARPS / SIDES) * 32, side = warp_id() / (WARPS / SIDES);
  const int g = lane_id() / 4, t = lane_id() % 4;

  // Starts the loads of a chunk into the buffers of its turn.
  const auto load = [&](int first, int chunk, int turn) {
    if (!resident || first == begin)
      load_chunk<ROWS>(tiles.even + (resident ? chunk : turn) * Tiles<T>::EVEN, p, image, 2 * row,
                       chunk * C::DEPTH);
    load_chunk<C::COLUMNS>(tiles.odd + turn * Tiles<T>::ODD, p, image, 2 * first + 1, chunk * C::DEPTH);
    cp_async_commit();
  };

  Best<Acc> best[4];  // of rows g, g + 8, g + 16, g + 24
  const int lowest = begin > p.first_odd() ? begin : p.first_odd();
  VK_UNROLL
  for (int r = 0; r < 4; ++r) best[r] = {-Acc(INFINITY), lowest};
  Acc even_squares = 0;
  int turn = 0;
  load(begin, 0, turn);
  VK_NO_UNROLL
  for (int first = begin; first < end; first += C::COLUMNS) {
    Sums<T> sums;
    tile_attention::clear(sums[0]);
    tile_attention::clear(sums[1]);
    Acc odd_squares = 0;
    VK_NO_UNROLL
    for (int chunk = 0; chunk < chunks; ++chunk) {
      cp_async_wait<0>();
      sync_block();  // the chunk is there for all, and all are done with the other buffers
      const bool last = chunk + 1 == chunks;
      const int next = last ? first + C::COLUMNS : first;
      if (next < end) load(next, last ? 0 : chunk + 1, turn ^ 1);
      const T* even = tiles.even + (resident ? chunk : turn) * Tiles<T>::EVEN;
      const T* odd = tiles.odd + turn * Tiles<T>::ODD;
      odd_squares += squares<C::COLUMNS>(odd);
      if (first == begin) even_squares += squares<ROWS>(even);
      const int rest = p.channels - chunk * C::DEPTH;
      const int depth = rest < C::DEPTH ? tile_attention::round_up(rest, C::STEP) : C::DEPTH;
      multiply<T>(sums, even + warp_row * C::LD, odd + side * 8 * C::TILES * C::LD, depth);
      turn ^= 1;
    }
    store_inverse<C::COLUMNS>(tiles.odd_inverse, odd_squares, lowest - first, end - first);
    if (first == begin) store_inverse<ROWS>(tiles.even_inverse, even_squares, 0, ROWS);
    sync_block();
    VK_UNROLL
    for (int j = 0; j < C::TILES; ++j) {
      VK_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int column = side * 8 * C::TILES + 8 * j + 2 * t + c;
        const Acc inverse = tiles.odd_inverse[column];
        VK_UNROLL
        for (int r = 0; r < 4; ++r) {
          // What is not a number is never larger; columns rise, so the lower of equal ones stays.
          const Acc value = sums[r / 2][j][r % 2 * 2 + c] * inverse;
          if (value > best[r].value) best[r] = {value, first + column};
        }
      }
    }
  }
  VK_UNROLL
  for (int r = 0; r < 4; ++r) {
    VK_UNROLL
    for (int lanes = 1; lanes < 4; lanes *= 2)
      best[r].take(shfl_xor(best[r].value, lanes), shfl_xor(best[r].odd, lanes));
    if (t == 0) {
      tiles.values[side * ROWS + warp_row + 8 * r + g] = best[r].value;
      tiles.odds[side * ROWS + warp_row + 8 * r + g] = best[r].odd;
    }
  }
}

}  // namespace vitkernels::bipartite_match
