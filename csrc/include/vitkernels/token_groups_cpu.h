// Rows of tokens on one core: copying them, and reducing the members of a group. What token_merge and
// token_unmerge share.
#pragma once
#include "vitkernels/params.h"
#include "vitkernels/simd.h"

namespace vitkernels::VITKERNELS_ISA {

// Vectors of a row that go through the registers together.
constexpr int kRowVecs = 8;

// A row from left to right: whole(channel) for kRowVecs vectors each time they fit, rest(channel, count) for
// up to a vector each of what remains.
template <class T, class Whole, class Rest>
VITKERNELS_INLINE void along_row(int64_t channels, Whole whole, Rest rest) {
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  for (; c + kRowVecs * L <= channels; c += kRowVecs * L) whole(c);
  for (; c < channels; c += L) rest(c, static_cast<int>(channels - c < L ? channels - c : L));
}

template <class E>
VITKERNELS_INLINE void copy_row(E* to, const E* from, int64_t channels) {
  __builtin_memcpy(to, from, channels * sizeof(E));
}

// to = from * factor
template <class E>
static void scale_row(E* to, const E* from, int64_t channels, Compute<E> factor) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  along_row<T>(
      channels,
      [&](int64_t c) {
#pragma GCC unroll 8
        for (int v = 0; v < kRowVecs; ++v) store(to + c + v * L, load(from + c + v * L) * factor);
      },
      [&](int64_t c, int count) { store_first(to + c, load_first(from + c, count) * factor, count); });
}

// How members of a group become a row: acc = first(x of a member), then acc = next(acc, x, member) for each
// of the others, and in the end last(acc).
template <class E, class First, class Next, class Last>
VITKERNELS_INLINE void reduce_rows(E* to, const E* tokens, int64_t stride, const int32_t* members, int count,
                                   int64_t channels, First first, Next next, Last last) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  along_row<T>(
      channels,
      [&](int64_t c) {
        Vec<T> acc[kRowVecs];
        const E* from = tokens + members[0] * stride + c;
#pragma GCC unroll 8
        for (int v = 0; v < kRowVecs; ++v) acc[v] = first(load(from + v * L), members[0]);
        for (int i = 1; i < count; ++i) {
          from = tokens + members[i] * stride + c;
#pragma GCC unroll 8
          for (int v = 0; v < kRowVecs; ++v) acc[v] = next(acc[v], load(from + v * L), members[i]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < kRowVecs; ++v) store(to + c + v * L, last(acc[v]));
      },
      [&](int64_t c, int rest) {
        Vec<T> acc = first(load_first(tokens + members[0] * stride + c, rest), members[0]);
        for (int i = 1; i < count; ++i)
          acc = next(acc, load_first(tokens + members[i] * stride + c, rest), members[i]);
        store_first(to + c, last(acc), rest);
      });
}

// to = the sum of the members, in their order
template <class E>
static void sum_rows(E* to, const E* tokens, int64_t stride, const int32_t* members, int count,
                     int64_t channels) {
  using V = Vec<Compute<E>>;
  reduce_rows(
      to, tokens, stride, members, count, channels, [](V x, int32_t) { return x; },
      [](V acc, V x, int32_t) { return acc + x; }, [](V acc) { return acc; });
}

}  // namespace vitkernels::VITKERNELS_ISA
