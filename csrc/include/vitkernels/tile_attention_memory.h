// Tiles between global and shared memory. A tile in shared memory is [ROWS][ld] with ld = channels rounded up
// to 16 plus 16 bytes: eight consecutive rows then start in eight different 16-byte bank groups, so ldmatrix
// and 16-byte accesses down a column are free of conflicts.
#pragma once
#include "vitkernels/chunk_order.h"
#include "vitkernels/tile_attention.h"

namespace vitkernels::tile_attention {

template <class T>
VK_HOST_DEVICE int leading_dimension(int channels) {
  return round_up(channels, 16) + static_cast<int>(16 / sizeof(T));
}

// One head's tokens and channels in global memory.
template <class T, class Map>
struct Matrix {
  T* data;
  typename PositionsOf<Map>::type position;
  int64_t channel_stride;
  int channels;

  VK_DEVICE Matrix(const View& view, const Map& map, int batch, int head, int channels)
      : data(offset<T>(view, batch, head)),
        position(view, map),
        channel_stride(view.stride[3]),
        channels(channels) {}

  // Whether 16-byte accesses along the channels are aligned.
  VK_DEVICE bool vectorized() const {
    constexpr int WIDTH = 16 / sizeof(T);
    return channel_stride == 1 && channels % WIDTH == 0 && position.multiples_of(WIDTH) &&
           reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  VK_DEVICE bool tokens_dense() const { return position.dense() && channel_stride != 1; }
};

// The order in which threads visit the (row, 16-byte chunk of channels) pairs of a tile; for tensors whose
// tokens are dense (views of NCHW maps) neighbours take all rows of a chunk. Powers of two only, so that
// there is no division; visits past the last chunk are skipped by the caller.
template <int ROWS>
struct Walk {
  ChunkOrder order{0, 0};

  VK_DEVICE Walk(int chunks, bool rows_first) {
    int bits = 0;
    while ((1 << bits) < chunks) ++bits;
    order = rows_first ? ChunkOrder{bits, log2_of(ROWS)} : ChunkOrder::of(bits);
  }
  VK_DEVICE int visits() const { return ROWS << order.chunk_bits; }
  VK_DEVICE int row(int i) const { return order.row(i); }
  VK_DEVICE int chunk(int i) const { return order.chunk(i); }
};

// What the host finds out once, so that the copies below need not: whether every row of a tensor can be moved
// 16 bytes at a time, and its tokens lie less than 2^31 bytes apart.
template <class T>
bool moves_wide(const View& view, int batch, int heads, int channels) {
  constexpr int WIDTH = 16 / sizeof(T);
  constexpr int64_t LONGEST = 0x7fffffff / sizeof(T);
  for (const int64_t stride : {view.stride[2], view.stride[4]})
    if (stride % WIDTH != 0 || stride > LONGEST || stride < -LONGEST) return false;
  return present(view) && view.stride[3] == 1 && channels % WIDTH == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (batch <= 1 || view.stride[0] % WIDTH == 0) &&
         (heads <= 1 || view.stride[1] % WIDTH == 0);
}

template <class T>
bool moves_wide(const View& view, const Problem& problem, int channels) {
  return moves_wide<T>(view, problem.batch, problem.heads, channels);
}

// The bits of ChunkOrder for rows of `channels`.
template <class T>
VK_HOST_DEVICE constexpr int chunk_bits(int channels) {
  int bits = 0;
  while ((16 / static_cast<int>(sizeof(T)) << bits) < channels) ++bits;
  return bits;
}

// visit(row, channel) for the 16-byte chunks of this thread's share of ROWS rows of `channels`: one channel,
// and rows at equal distances, so that addresses are made by additions, or unrolled, of constants. `bits` for
// at least 16 channels.
template <int ROWS, class T, class Visit>
VK_DEVICE void visit_chunks(int thread, int bits, int channels, Visit visit) {
  constexpr int WIDTH = 16 / sizeof(T), THREADS = Group<ROWS>::THREADS;
  static_assert(sizeof(T) == 2, "rows of wider types may have more chunks than threads");
  forget(thread);  // lest what follows from it wait in registers for the next tile
  const ChunkOrder order = ChunkOrder::of(bits);
  const int channel = order.chunk(thread) * WIDTH, step = THREADS >> bits;
  if (channel >= channels) return;  // of a number of chunks that is no power of two
  const int row = order.row(thread), visits = (ROWS << bits) / THREADS;
  VK_UNROLL
  for (int n = 0; n < visits; ++n) visit(row + n * step, channel);
}

// Rows token(slot) of `source`, zeros where there is no token, no channel, or no tensor; `padded` channels of
// them, if more than a multiple of 16. Asynchronous where it can be: call cp_async_commit() after it.
template <int ROWS, class T, class Map, class Token>
VK_DEVICE void load_tile(T* tile, int ld, const Matrix<T, Map>& source, const Group<ROWS>& group, Token token,
                         int padded = 0) {
  constexpr int WIDTH = 16 / sizeof(T);
  if (padded == 0) padded = round_up(source.channels, 16);
  const int chunks = padded / WIDTH;
  const bool present = source.data != nullptr;
  if (present && source.vectorized()) {
    const Walk<ROWS> walk(chunks, false);
    VK_NO_UNROLL
    for (int i = group.thread; i < walk.visits(); i += Group<ROWS>::THREADS) {
      const int row = walk.row(i), channel = walk.chunk(i) * WIDTH;
      if (walk.chunk(i) >= chunks) continue;
      const int index = token(row);
      const bool valid = index >= 0 && channel < source.channels;
      cp_async16(tile + row * ld + channel,
                 valid ? source.data + source.position(index) + channel : source.data, valid);
    }
    return;
  }
  const Walk<ROWS> walk(chunks, source.tokens_dense());
  VK_NO_UNROLL
  for (int i = group.thread; i < walk.visits(); i += Group<ROWS>::THREADS) {
    const int row = walk.row(i), channel = walk.chunk(i) * WIDTH;
    if (walk.chunk(i) >= chunks) continue;
    const int index = present ? token(row) : -1;
    Vec<T, WIDTH> values;
    VK_UNROLL
    for (int e = 0; e < WIDTH; ++e) {
      values[e] = index >= 0 && channel + e < source.channels
                      ? source.data[source.position(index) + (channel + e) * source.channel_stride]
                      : from_float<T>(0.0f);
    }
    values.store(tile + row * ld + channel);
  }
}

// load_tile() of a tensor whose tokens are dense: a thread keeps to one row, whose token is found once, and
// two of its chunks are on their way together. An element takes a sum for its address, not a multiplication.
template <int ROWS, class T, class Map, class Token>
VK_DEVICE void load_columns(T* tile, int ld, const Matrix<T, Map>& source, const Group<ROWS>& group,
                            Token token, int padded) {
  constexpr int WIDTH = 16 / sizeof(T), STRIDE = Group<ROWS>::THREADS / ROWS * WIDTH;
  int thread = group.thread;
  forget(thread);  // as in visit_chunks()
  const int row = thread % ROWS, index = token(row);
  int channel = thread / ROWS * WIDTH, left = (index < 0 ? 0 : source.channels) - channel;
  const int64_t step = source.channel_stride * static_cast<int64_t>(sizeof(T));
  uintptr_t from = reinterpret_cast<uintptr_t>(source.data + (index < 0 ? 0 : source.position(index))) +
                   static_cast<uintptr_t>(channel * step);
  const auto chunk = [&](int count) {
    Vec<T, WIDTH> values;
    VK_UNROLL
    for (int e = 0; e < WIDTH; ++e) {
      values[e] = from_float<T>(0.0f);
      if (e < count) values[e] = *reinterpret_cast<const T*>(from);
      from += static_cast<uintptr_t>(step);
    }
    from += static_cast<uintptr_t>((STRIDE - WIDTH) * step);
    return values;
  };
  T* to = tile + row * ld + channel;
  VK_NO_UNROLL
  for (; channel < padded; channel += 2 * STRIDE) {
    const auto values = chunk(left), next = chunk(left - STRIDE);
    values.store(to);
    if (channel + STRIDE < padded) next.store(to + STRIDE);
    to += 2 * STRIDE;
    left -= 2 * STRIDE;
  }
}

// load_tile() of a tensor that moves_wide(): tokens by the map's Positions, `padded` channels.
template <int ROWS, class T, class Map, class Token>
VK_DEVICE void copy_tile(T* tile, int ld, const Matrix<T, Map>& source, const Group<ROWS>& group, int bits,
                         int padded, Token token) {
  visit_chunks<ROWS, T>(group.thread, bits, padded, [&](int row, int channel) {
    const int index = token(row);
    cp_async16(tile + row * ld + channel, source.position.near(source.data + channel, index),
               index >= 0 && channel < source.channels);
  });
}
// The same for tokens that follow each other.
template <int ROWS, class T, class Map>
VK_DEVICE void copy_tile(T* tile, int ld, const Matrix<T, Map>& source, const Group<ROWS>& group, int bits,
                         int padded, const Run& run) {
  visit_chunks<ROWS, T>(group.thread, bits, padded, [&](int row, int channel) {
    cp_async16(tile + row * ld + channel, source.position.near(source.data + channel, run.first + row),
               row < run.count && channel < source.channels);
  });
}
// One or the other, as the tensor allows. Both `tokens`, which may be a Run, and token(slot) name the rows.
template <int ROWS, class T, class Map, class Tokens, class Token>
VK_DEVICE void fetch_tile(T* tile, int ld, const Matrix<T, Map>& source, const Group<ROWS>& group, bool wide,
                          int bits, int padded, const Tokens& tokens, const Token& token) {
  if (wide)
    copy_tile(tile, ld, source, group, bits, padded, tokens);
  else
    load_tile(tile, ld, source, group, token, padded);
}

// store_tile() of a tensor that moves_wide(), by one warp: 16 rows.
template <class T, class Map, class Token>
VK_DEVICE void store_rows(const Matrix<T, Map>& target, const T* rows, int ld, int bits, Token token) {
  visit_chunks<16, T>(lane_id(), bits, target.channels, [&](int row, int channel) {
    const int index = token(row);
    if (index < 0) return;
    Vec<T, 16 / sizeof(T)>::load(rows + row * ld + channel)
        .store(target.position.near(target.data + channel, index));
  });
}

template <int ROWS, class T, class Map, class Token>
VK_DEVICE void store_tile(const Matrix<T, Map>& target, const T* tile, int ld, const Group<ROWS>& group,
                          Token token) {
  constexpr int WIDTH = 16 / sizeof(T);
  const int chunks = (target.channels + WIDTH - 1) / WIDTH;
  const bool vectorized = target.vectorized();
  const Walk<ROWS> walk(chunks, target.tokens_dense());
  VK_NO_UNROLL
  for (int i = group.thread; i < walk.visits(); i += Group<ROWS>::THREADS) {
    const int row = walk.row(i), channel = walk.chunk(i) * WIDTH;
    if (walk.chunk(i) >= chunks) continue;
    const int index = token(row);
    if (index < 0) continue;
    const auto values = Vec<T, WIDTH>::load(tile + row * ld + channel);
    T* destination = target.data + target.position(index) + channel * target.channel_stride;
    if (vectorized) {
      values.store(destination);
      continue;
    }
    VK_UNROLL
    for (int e = 0; e < WIDTH; ++e)
      if (channel + e < target.channels) destination[e * target.channel_stride] = values[e];
  }
}

}  // namespace vitkernels::tile_attention
