// Maps and their decays on the CPU: tokens in and out of strided tensors, sums of decays, and the gradients
// of those. Compiled once per instruction set.
#pragma once
#include "cpu_kernel.h"
#include "vitkernels/tile_attention_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

template <class E>
VITKERNELS_INLINE E* token(const View& view, int64_t batch, int head, int y, int x) {
  return static_cast<E*>(view.data) + batch * view.stride[0] + static_cast<ptrdiff_t>(y) * view.stride[1] +
         static_cast<ptrdiff_t>(x) * view.stride[2] + head * view.stride[3];
}

// A tensor [pair][batch][head][y][x], from one head on.
template <class T>
VITKERNELS_INLINE T* plane(const View& view, int which, int64_t batch, int head) {
  return static_cast<T*>(view.data) + which * view.stride[0] + batch * view.stride[1] + head * view.stride[2];
}

// One product with v that was saved, as a tensor [batch][y][x][head][channel].
template <class E>
VITKERNELS_INLINE View saved_product(const Params& p, int which) {
  View view = p.out;
  view.data = static_cast<E*>(p.partial.data) + which * p.partial.stride[0];
  return view;
}

// One head's tokens, row by row, as [token][channel].
template <class E, class T>
static void read_map(const Params& p, const View& view, int64_t batch, int head, int channels, T factor,
                     T* to) {
  const int pitch = round_up_lanes<T>(channels);
  for (int y = 0; y < p.height; ++y)
    pack(to + static_cast<ptrdiff_t>(y) * p.width * pitch, pitch, token<const E>(view, batch, head, y, 0),
         view.stride[2], view.stride[4], p.width, channels, factor);
}
template <class E, class T>
static void write_map(const Params& p, const View& view, int64_t batch, int head, int channels,
                      const T* factors, const T* from) {
  const int pitch = round_up_lanes<T>(channels);
  for (int y = 0; y < p.height; ++y)
    unpack(token<E>(view, batch, head, y, 0), view.stride[2], view.stride[4],
           from + static_cast<ptrdiff_t>(y) * p.width * pitch, pitch, p.width, channels, factors);
}

// Rows of a head [token][channel] as products write them: in the tensor itself where that is possible, with
// no conversion, whole vectors and sums in one go, since tokens that lie far apart are slow to take up again;
// otherwise in scratch, from where deliver() brings them.
template <class E>
struct Result {
  using T = Compute<E>;
  const Params& p;
  const View& view;
  E* tensor;
  int rows, channels, pitch;
  bool in_place;
  T* data;
  ptrdiff_t step;

  // `terms`: of the longest sum. Sums over so few tokens are never taken up for another tile of queries.
  static_assert(kRun <= kTileWidth);
  Result(const Params& p, const View& view, int64_t batch, int head, int y, int rows, int channels, int terms,
         T* scratch)
      : p(p),
        view(view),
        tensor(view ? token<E>(view, batch, head, y, 0) : nullptr),
        rows(rows),
        channels(channels),
        pitch(round_up_lanes<T>(channels)),
        in_place(kSame<E, T> && view && view.stride[4] == 1 && channels == pitch && terms <= kRun &&
                 (rows == 1 || view.stride[1] == p.width * view.stride[2])),
        data(scratch),
        step(pitch) {
    if constexpr (kSame<E, T>)
      if (in_place) data = tensor, step = view.stride[2];
  }
  T* at(int i) const { return data + i * step; }
  void deliver(const T* ones) const { deliver(ones, 0, rows * p.width); }
  // Tokens [first, last) of them.
  void deliver(const T* ones, int first, int last) const {
    for (int y = first / p.width; view && !in_place && y * p.width < last; ++y) {
      const int x = y * p.width < first ? first - y * p.width : 0, end = imin(last - y * p.width, p.width);
      unpack(tensor + y * view.stride[1] + x * view.stride[2], view.stride[2], view.stride[4],
             at(y * p.width + x), pitch, end - x, channels, ones);
    }
  }
};

// A forward pass over few heads takes each in bands of its tiles of queries, for parallelism alone.
VITKERNELS_INLINE int bands(const Params& p, int tiles) {
  const int64_t heads = p.batch * p.heads;
  return heads >= 16 || heads == 0 ? 1 : imin(tiles, static_cast<int>((15 + heads) / heads));
}

// Tokens that come next, brought nearer while others are worked on. A head's tokens lie apart, with the other
// heads' between them, so that no processor sees by itself where it goes on; and a few at a time, since all
// at once the requests would wait for each other.
struct Ahead {
  static constexpr int kMost = 8;
  const char* at[kMost];
  ptrdiff_t next_token[kMost], next_row[kMost];
  int bytes[kMost], views = 0, width, column = 0, left, share;

  // `tokens` of a map from the beginning of a row on, in `steps` steps.
  Ahead(const Params& p, int tokens, int steps)
      : width(p.width), left(tokens), share(ceil_div(tokens, steps)) {}

  template <class E>
  void add(const View& view, int64_t batch, int head, int y, int channels) {
    if (left == 0 || !view || view.stride[4] != 1) return;
    at[views] = reinterpret_cast<const char*>(token<const E>(view, batch, head, y, 0));
    next_token[views] = view.stride[2] * static_cast<ptrdiff_t>(sizeof(E));
    next_row[views] = view.stride[1] * static_cast<ptrdiff_t>(sizeof(E)) - (width - 1) * next_token[views];
    bytes[views++] = channels * static_cast<int>(sizeof(E));
  }

  void step() {
    for (int tokens = imin(share, left); tokens > 0; --tokens) {
      --left;
      const bool turns = ++column == width;
      if (turns) column = 0;
      for (int v = 0; v < views; ++v) {
        for (int byte = 0; byte < bytes[v]; byte += 64) __builtin_prefetch(at[v] + byte, 0, 2);
        at[v] += turns ? next_row[v] : next_token[v];
      }
    }
  }
};

// ---- decays

template <class E, class Visit>
VITKERNELS_INLINE void by_decay(const Params& p, Visit visit) {
  if constexpr (!kSame<E, float>) {
    if (p.decay_dtype == p.dtype) return visit(E{});
  }
  if constexpr (!kSame<E, double>) visit(float{});
}

// In double: what a float keeps of a sum is then its rounding alone, and sums of decays <= 0 fall
// monotonously. The first of a line is in no difference of two sums, and may be anything, -inf too.
template <class T, class D>
static void sum_decays_of(const Params& p, int64_t batch, int head, D) {
  T *along = plane<T>(p.cum, 0, batch, head), *down = plane<T>(p.cum, 1, batch, head);
  for (int y = 0; y < p.height; ++y) {
    double sum = 0;
    for (int x = 0; x < p.width; ++x) {
      if (x > 0) sum += load_one(token<const D>(p.log_decay_w, batch, head, y, x));
      along[static_cast<ptrdiff_t>(y) * p.width + x] = static_cast<T>(sum);
    }
  }
  for (int x = 0; x < p.width; ++x) {
    double sum = 0;
    for (int y = 0; y < p.height; ++y) {
      if (y > 0) sum += load_one(token<const D>(p.log_decay_h, batch, head, y, x));
      down[static_cast<ptrdiff_t>(y) * p.width + x] = static_cast<T>(sum);
    }
  }
}

template <class E>
VITKERNELS_INLINE void sum_decays(const Params& p, int64_t batch, int head) {
  by_decay<E>(p, [&](auto d) { sum_decays_of<Compute<E>>(p, batch, head, d); });
}

// From the gradients of `count` sums, `step` apart, to those of the decays: each decay is in its own sum and
// in all later ones. The first is in no difference of two sums.
template <class T, class D>
static void differentiate_sums(const T* grad, ptrdiff_t step, int count, D* to, ptrdiff_t to_step) {
  double sum = 0;
  for (int i = count - 1; i > 0; --i) {
    sum += grad[i * step];
    store_one(to + i * to_step, static_cast<Compute<D>>(sum));
  }
  store_one(to, Compute<D>(0));
}

// What the decays between the lanes' positions and another add up to, from the sums at both: the later's less
// the earlier's, by the order of the positions alone.
template <class T>
VITKERNELS_INLINE Vec<T> between(Vec<T> at_lanes, T at, IntVec<T> lanes, int position) {
  const Vec<T> rise = at_lanes - at;
  return lanes >= static_cast<typename Bits<T>::type>(position) ? rise : -rise;
}
// x where the lane's position is the later one, -x where the earlier, 0 where they are the same.
template <class T>
VITKERNELS_INLINE Vec<T> towards(Vec<T> x, IntVec<T> lanes, int position) {
  const auto at = static_cast<typename Bits<T>::type>(position);
  return lanes > at ? x : lanes < at ? -x : Vec<T>{};
}
template <class T>
VITKERNELS_INLINE IntVec<T> positions_from(int first) {
  IntVec<T> lanes;
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i;
  return lanes + static_cast<typename Bits<T>::type>(first);
}

// What all of a query's e^(logit - lse) are to be multiplied by, from their sum: lse is rounded by as much as
// it is large, which the sum is off from 1 by. In a lane that has no query it is 0.
template <class T>
VITKERNELS_INLINE Vec<T> undo_rounding_of_lse(Vec<T> sum) {
  return T(1) / (sum == T(0) ? broadcast(T(1)) : sum);
}

// to[i] += the sum of the lanes of rows[i], for `count` rows that follow each other.
template <class T>
static void add_across(T* to, const T* rows, int count) {
  constexpr int L = kLanes<T>;
  int i = 0;
  for (; i + L <= count; i += L) {
    Vec<T> block[L];
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) block[j] = load(rows + (i + j) * L);
    transpose<T>(block);
#pragma GCC unroll 4
    for (int half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int j = 0; j < half; ++j) block[j] += block[j + half];
    store(to + i, load(to + i) + block[0]);
  }
  for (; i < count; ++i) to[i] += across<T>(load(rows + i * L));
}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention
