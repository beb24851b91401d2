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

// Rows token(slot) of `source`, zeros where there is no token, no channel, or no tensor. Asynchronous where
// it can be: call cp_async_commit() after it.
template <int ROWS, class T, class Map, class Token>
VK_DEVICE void load_tile(T* tile, int ld, const Matrix<T, Map>& source, const Group<ROWS>& group,
                         Token token) {
  constexpr int WIDTH = 16 / sizeof(T);
  const int chunks = round_up(source.channels, 16) / WIDTH;
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
