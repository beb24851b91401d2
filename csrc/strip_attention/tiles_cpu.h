// What the forward and the backward pass on the CPU share: one head's keys and values, tiles of queries.
//
// Queries lie in the vector lanes while logits and weights are computed, so the softmax runs down the rows
// and a key is one broadcast number; channels lie in the lanes of the products with the values, whose rows
// are then whole tokens, as they lie in memory.
#pragma once
#include "cpu_kernel.h"
#include "vitkernels/tile_attention_cpu.h"

namespace vitkernels::strip_attention {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

constexpr int kTileKeys = 64;  // one run of a product

// One head of a tensor [batch, head, token, channel] as [token][channel]; `channels` is 1 or the channels
// lie side by side.
template <class E>
VITKERNELS_INLINE Matrix<E> tokens(const View& view, int64_t batch, int64_t head) {
  return {static_cast<E*>(view.data) + batch * view.stride[0] + head * view.stride[1], view.stride[2], 1};
}

// Keys by tiles of equal size.
struct KeyTiles {
  int keys, count, width;
  explicit KeyTiles(int64_t all)
      : keys(static_cast<int>(all)), count(ceil_div(keys, kTileKeys)), width(ceil_div(keys, count)) {}
  int start(int tile) const { return tile * width; }
  int size(int tile) const { return imin(width, keys - start(tile)); }
};

// Whether the logits are an outer product, of which the largest in a row is known beforehand.
VITKERNELS_INLINE bool is_outer(const Params& p) {
  return p.key_dim == 1 && !p.bias;
}

// Numbers of tokens, side by side: to[i] = factor * from[i * step].
template <class E, class T>
VITKERNELS_INLINE void read_numbers(T* to, const E* from, ptrdiff_t step, int count, T factor) {
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) to[i] = load_one(from + i * step) * factor;
}

// While a head is at hand: asks for its share of the next batch entry's rows, of all heads, to read or to
// write them. Rows of one head lie too far apart for the processor to see that they follow each other. A
// small tensor is in the last-level cache already, where asking costs more than waiting.
template <class E, bool kWritten = false>
VITKERNELS_INLINE void expect_next(const Params& p, const View& view, int64_t b, int64_t h, int64_t rows) {
  constexpr int64_t kMost = 128 << 10;  // bytes: a share of the second-level cache
  constexpr int64_t kSmall = 4 << 20;
  constexpr int line = 64 / sizeof(E);
  const int64_t channels = static_cast<int64_t>(p.heads) * p.value_dim;
  const int64_t bytes = rows * channels * static_cast<int64_t>(sizeof(E));  // of a batch entry
  if (!view || b + 1 == p.batch || p.heads == 1 || view.stride[1] != p.value_dim || bytes > kMost ||
      p.batch * bytes < kSmall)
    return;
  const Matrix<const E> all = tokens<const E>(view, b + 1, 0);
  for (int64_t i = h * rows / p.heads, end = (h + 1) * rows / p.heads; i < end; ++i)
    for (int64_t c = 0; c < channels; c += line) __builtin_prefetch(all.data + i * all.token + c, kWritten);
}

// Whether rows of channels can be read and written as whole vectors where they lie.
template <class E, class T>
VITKERNELS_INLINE bool rows_in_place(int channels) {
  return kSame<E, T> && channels % kLanes<T> == 0;
}

// Rows of channels in the lanes of a product.
template <class T>
struct Rows {
  const T* data;
  ptrdiff_t pitch;
  const T* at(int row) const { return data + row * pitch; }
};
template <class E, class T>
VITKERNELS_INLINE Rows<T> read_rows(Matrix<const E> m, int rows, int channels, T factor, T* scratch) {
  if constexpr (kSame<E, T>)
    if (factor == T(1) && rows_in_place<E, T>(channels)) return {m.data, m.token};
  const int pitch = round_up_lanes<T>(channels);
  pack(scratch, pitch, m.data, m.token, 1, rows, channels, factor);
  return {scratch, pitch};
}
template <class E, class T>
static void write_rows(Matrix<E> m, const T* rows, int pitch, int count, int channels) {
  const int whole = channels / kLanes<T> * kLanes<T>;
  for (int i = 0; i < count; ++i) {
    const T* from = rows + static_cast<ptrdiff_t>(i) * pitch;
    E* to = m.data + i * m.token;
    for (int c = 0; c < whole; c += kLanes<T>) store(to + c, load(from + c));
    if (whole < channels) store_first(to + whole, load(from + whole), channels - whole);
  }
}

// Calls visit with a value of the type that a bias is held in.
template <class E, class Visit>
VITKERNELS_INLINE void by_type(DType held, DType own, Visit visit) {
  if constexpr (!kSame<E, float>) {
    if (held == own) return visit(E{});
  }
  if constexpr (!kSame<E, double>) visit(float{});
}

// The biases of a tile of keys and queries, [key][query].
template <class E, class T>
static void read_bias(const Params& p, int64_t batch, int64_t head, int key, int keys, int query, int queries,
                      T* to, int width) {
  const int64_t* stride = p.bias.stride;
  const int64_t first = batch * stride[0] + head * stride[1] + query * stride[2] + key * stride[3];
  by_type<E>(p.bias_dtype, p.dtype, [&](auto held) {
    using B = decltype(held);
    pack(to, width, static_cast<const B*>(p.bias.data) + first, stride[3], stride[2], keys, queries, T(1));
  });
}

// Logits of a tile that are no outer product, [key][query]: the rows are keys, q is [channel][query] and has
// the scale in it. Leaves them in s.
template <class E, class T>
static void logits(const Params& p, int64_t batch, int64_t head, Matrix<const T> k, int key, int keys,
                   const T* q, int query, int queries, T* s, int width) {
  if (p.bias) read_bias<E>(p, batch, head, key, keys, query, queries, s, width);
  multiply<T>(ceil_div(queries, kLanes<T>), {keys, p.key_dim, k.data + key * k.token, k.token, k.channel, q,
                                             width, p.bias ? s : nullptr, width, s, width});
}

// The gradients of the logits of a tile, [key][query], to where the gradient of the bias is made from them.
template <class E, class T>
static void write_bias_gradient(const Params& p, int64_t batch, int64_t head, int key, int keys, int query,
                                int queries, const T* from, int width, const T* ones) {
  const int64_t* stride = p.grad_bias.stride;
  const int64_t first = batch * stride[0] + head * stride[1] + query * stride[2] + key * stride[3];
  by_type<E>(p.grad_bias_dtype, p.dtype, [&](auto held) {
    using B = decltype(held);
    unpack(static_cast<B*>(p.grad_bias.data) + first, stride[3], stride[2], from, width, keys, queries, ones);
  });
}

// Calls run.template operator()<V>(vector) on the vectors of a tile, two at a time.
template <class Run>
VITKERNELS_INLINE void by_twos(int vecs, Run run) {
  int v = 0;
  for (; v + 2 <= vecs; v += 2) run.template operator()<2>(v);
  if (v < vecs) run.template operator()<1>(v);
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::strip_attention
