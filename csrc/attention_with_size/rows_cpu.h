// What the forward and the backward pass on the CPU share: rows of tokens, tiles of keys, sizes.
//
// Queries lie in the vector lanes while logits and weights are computed, so a softmax runs down the rows and
// a key, like the logarithm of its size, is one broadcast number. Channels lie in the lanes of the products
// with values, keys and queries, whose rows are then whole tokens.
#pragma once
#include "cpu_kernel.h"
#include "vitkernels/tile_attention_cpu.h"

namespace vitkernels::attention_with_size {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

constexpr int kTileKeys = 64;  // one run of a product

// Terms of a logit in one chain. A library's product of one row with a matrix has chains of an eighth of the
// length, and what the logits of few queries err is all that the largest error of their gradients is made of.
VITKERNELS_INLINE int logit_run(int64_t queries) {
  constexpr int few = 16;
  return queries <= 8 && few < kRun ? few : kRun;
}

// Keys by tiles of equal size.
struct KeyTiles {
  int keys, count, width;
  explicit KeyTiles(int64_t all)
      : keys(static_cast<int>(all)), count(ceil_div(keys, kTileKeys)), width(ceil_div(keys, count)) {}
  int start(int tile) const { return tile * width; }
  int size(int tile) const { return imin(width, keys - start(tile)); }
};

// One head of a tensor [batch, head, token, channel], from a token on.
template <class E>
VITKERNELS_INLINE Matrix<E> tokens(const View& view, int64_t batch, int64_t head, int64_t first = 0) {
  const int64_t* stride = view.stride;
  return {static_cast<E*>(view.data) + batch * stride[0] + head * stride[1] + first * stride[2], stride[2],
          1};
}

// Rows of tokens in the compute type, `pitch` apart, zeros up to the next vector. Copied once for a head,
// even where they could be read in place: those of a packed projection lie a page apart and share few
// cache sets.
template <class E, class T>
VITKERNELS_INLINE void read_rows(Matrix<const E> m, int count, int channels, T factor, T* to) {
  pack(to, round_up_lanes<T>(channels), m.data, m.token, 1, count, channels, factor);
}
template <class E, class T>
static void write_rows(Matrix<E> m, const T* rows, int pitch, int count, int channels, T factor) {
  const int whole = channels / kLanes<T> * kLanes<T>;
  for (int i = 0; i < count; ++i, rows += pitch) {
    E* to = m.data + i * m.token;
    for (int c = 0; c < whole; c += kLanes<T>) store(to + c, load(rows + c) * factor);
    if (whole < channels) store_first(to + whole, load(rows + whole) * factor, channels - whole);
  }
}

// to[m] = log(size[m]); -inf of 0, NaN of what is negative. In double: what a logarithm errs, all weights of
// that size err together.
template <class T>
static void read_sizes(const View& view, int64_t batch, int keys, T* to) {
  constexpr int L = kLanes<double>;
  constexpr double least = 0x1p-1022;
  const T* from = static_cast<const T*>(view.data) + batch * view.stride[0];
  for (int i = 0; i < keys; i += L) {
    const int count = imin(L, keys - i);
    double lanes[L] = {};
    for (int j = 0; j < count; ++j) lanes[j] = from[(i + j) * view.stride[1]];
    const Vec<double> x = load(lanes), normal = x < least ? x * 0x1p64 : x,
                      shift = x < least ? broadcast(44.36141955583649980256) : Vec<double>{},
                      log = log_softmax<double>(normal) - shift,
                      edge = x == 0.0 ? broadcast(-__builtin_inf()) : broadcast(__builtin_nan(""));
    store(lanes, x > 0.0 ? log : edge);
    for (int j = 0; j < count; ++j) to[i + j] = static_cast<T>(lanes[j]);
  }
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::attention_with_size
