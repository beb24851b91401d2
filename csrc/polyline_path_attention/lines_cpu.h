// Rows and columns of a map, the lines in which criss-cross attention works, and one head gathered to pass
// through them. Compiled once per instruction set.
//
// In a tensor of many heads the tokens of one lie far apart, a cache line or two each. They are gathered
// once, so that all sweeps read them side by side, and products take them where they lie, by rows or by
// columns. Matrices of a line are [key][query]: queries in the lanes, so that a softmax goes down and never
// across.
#pragma once
#include "maps_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {

enum Sweep { kRows, kColumns, kRowsAgain };

VITKERNELS_INLINE bool is_vertical(int sweep) {
  return sweep == kColumns;
}
VITKERNELS_INLINE int line_length(const Params& p, int sweep) {
  return is_vertical(sweep) ? p.height : p.width;
}
VITKERNELS_INLINE int lines_of_map(const Params& p, int sweep) {
  return is_vertical(sweep) ? p.width : p.height;
}
VITKERNELS_INLINE int longest_line(const Params& p) {
  return p.height > p.width ? p.height : p.width;
}
VITKERNELS_INLINE int64_t sweep_items(const Params& p, int sweep) {
  return p.batch * p.heads * lines_of_map(p, sweep);
}
VITKERNELS_INLINE int64_t head_items(const Params& p) {
  return p.batch * p.heads;
}

// Tokens from one row of a gathered head to the next. An odd number: a column's tokens, a large power of two
// apart, would share few sets of the caches.
VITKERNELS_INLINE int row_step(const Params& p) {
  return p.width | 1;
}
VITKERNELS_INLINE size_t gathered_tokens(const Params& p) {
  return static_cast<size_t>(p.height) * row_step(p);
}

// Whether a head's probabilities of rows are kept from the first sweep over them for the second.
template <class T>
VITKERNELS_INLINE bool keeps_rows(const Params& p) {
  const Tiling<T> tiling(p.width);
  return static_cast<int64_t>(p.height) * p.width * tiling.count * tiling.width *
             static_cast<int64_t>(sizeof(T)) <=
         1 << 20;
}

// Where a line is.
struct Place {
  int64_t batch;
  int head, line;
};

// Tokens [token][channel] of a line, `step` elements apart.
template <class T>
struct Tokens {
  T* data;
  ptrdiff_t step;

  T* at(int i) const { return data + i * step; }
  // [channel][token] of `count` tokens from `begin` on, zeros up to the next whole vector
  void read_lanes(int begin, int count, int channels, T* to, int width) const {
    pack(to, width, static_cast<const T*>(at(begin)), 1, step, channels, count, T(1));
  }
};

// One row or column of a head.
template <class T>
struct Line {
  int index, length;
  bool vertical;
  ptrdiff_t first, step;                    // in a plane [y][x]
  ptrdiff_t gathered_first, gathered_step;  // in a gathered head

  Line(const Params& p, int index, int sweep)
      : index(index),
        length(line_length(p, sweep)),
        vertical(is_vertical(sweep)),
        first(vertical ? index : static_cast<ptrdiff_t>(index) * p.width),
        step(vertical ? p.width : 1),
        gathered_first(vertical ? index : static_cast<ptrdiff_t>(index) * row_step(p)),
        gathered_step(vertical ? row_step(p) : 1) {}

  Tokens<T> of(T* head, int pitch) const { return {head + gathered_first * pitch, gathered_step * pitch}; }
  // One number a token of a plane [y][x], padded to `padded` elements.
  void read(const T* plane, T* to, int padded, bool repeat_last, T padding) const {
    const T* from = plane + first;
    for (int i = 0; i < length; ++i) to[i] = from[i * step];
    for (int i = length; i < padded; ++i) to[i] = repeat_last ? to[length - 1] : padding;
  }
};

// Between the tensors and a gathered head, a row at a time.
template <class E, class T>
VITKERNELS_INLINE void gather_row(const Params& p, const View& view, int64_t batch, int head, int y,
                                  int channels, T factor, T* to, int pitch) {
  pack(to + static_cast<ptrdiff_t>(y) * row_step(p) * pitch, pitch, token<const E>(view, batch, head, y, 0),
       view.stride[2], view.stride[4], p.width, channels, factor);
}
// Where the last sweep over a row leaves it.
template <class E, class T>
VITKERNELS_INLINE Result<E> row_result(const Params& p, const View& view, int64_t batch, int head, int y,
                                       int channels, T* gathered) {
  T* row = gathered + static_cast<ptrdiff_t>(y) * row_step(p) * round_up_lanes<T>(channels);
  return Result<E>(p, view, batch, head, y, 1, channels, p.width, row);
}

// visit(key, what the decays between it and each lane's query add up to), for queries from `lane` on.
template <class T, class Visit>
VITKERNELS_INLINE void visit_keys(const T* sums, int keys, int lane, Visit visit) {
  constexpr int L = kLanes<T>;
  const Vec<T> queries = load(sums + lane);
  const int before = imin(keys, lane), mixed = imin(keys, lane + L);
  int key = 0;
  for (; key < before; ++key) visit(key, queries - sums[key]);
  const IntVec<T> lanes = positions_from<T>(lane);
  for (; key < mixed; ++key) visit(key, between<T>(queries, sums[key], lanes, key));
  for (; key < keys; ++key) visit(key, sums[key] - queries);
}

// s, logits of a vector of queries, becomes e^(logit - shift); returns its sum.
template <class T>
VITKERNELS_INLINE Vec<T> exponentials(T* s, int keys, int width, Vec<T> shift) {
  Vec<T> sum = {};
  for (int key = 0; key < keys;) {
    Vec<T> run = {};
    for (const int end = imin(keys, key + kRun); key < end; ++key) {
      T* at = s + static_cast<ptrdiff_t>(key) * width;
      const Vec<T> e = exp_softmax<T>(load(at) - shift);
      store(at, e);
      run += e;
    }
    sum += run;
  }
  return sum;
}

// s, scores of a vector of queries, becomes e^(logit - max); then its sum's inverse and logarithm.
template <class T>
static __attribute__((noinline)) void softmax_of_line(const T* sums, int keys, int lane, T* s, int width,
                                                      T* inverse, T* lse) {
  Vec<T> top = broadcast(-static_cast<T>(__builtin_inff()));
  visit_keys(sums, keys, lane, [&](int key, Vec<T> mask) {
    T* at = s + static_cast<ptrdiff_t>(key) * width;
    const Vec<T> logit = load(at) + mask;
    store(at, logit);
    top = vmax(logit, top);
  });
  const Vec<T> sum = exponentials(s, keys, width, top);
  store(inverse, T(1) / sum);
  store(lse, top + log_softmax<T>(sum));
}

// The same from the logarithm that is known: scores become probabilities.
template <class T>
static __attribute__((noinline)) void recall_line(const T* sums, int keys, int lane, Vec<T> lse, T* s,
                                                  int width) {
  visit_keys(sums, keys, lane, [&](int key, Vec<T> mask) {
    T* at = s + static_cast<ptrdiff_t>(key) * width;
    store(at, load(at) + mask);
  });
  const Vec<T> inverse = undo_rounding_of_lse<T>(exponentials(s, keys, width, lse));
  for (int key = 0; key < keys; ++key) {
    T* at = s + static_cast<ptrdiff_t>(key) * width;
    store(at, load(at) * inverse);
  }
}

// The sweeps of a pass, by lines of all heads and by heads. A Pass<E> is made from its parameters, one head's
// memory and a thread's scratch; line(sweep, index) computes one line.
template <template <class> class Pass>
struct Sweeps {
  static size_t head_bytes(const Params& p) {
    return with_dtype(p.dtype, [&](auto e) { return Pass<decltype(e)>::head_size(p); });
  }
  static size_t line_bytes(const Params& p) {
    return with_dtype(p.dtype, [&](auto e) { return Pass<decltype(e)>::scratch_size(p); });
  }
  static size_t both_bytes(const Params& p) { return head_bytes(p) + line_bytes(p); }

  template <int S>
  static int64_t items(const Params& p) {
    return sweep_items(p, S);
  }
  template <int S>
  static void lines(const Params& p, int64_t begin, int64_t end, void* scratch) {
    const int64_t count = lines_of_map(p, S), bytes = static_cast<int64_t>(head_bytes(p));
    // Heads change fastest: they lie side by side.
    const auto place = [&](int64_t item) {
      return Place{item / p.heads / count, static_cast<int>(item % p.heads),
                   static_cast<int>(item / p.heads % count)};
    };
    with_dtype(p.dtype, [&](auto e) {
      for (int64_t item = begin; item < end; ++item) {
        const Place at = place(item);
        char* memory = static_cast<char*>(p.workspace) + (at.batch * p.heads + at.head) * bytes;
        Pass<decltype(e)>(p, at.batch, at.head, memory, scratch)
            .line(S, at.line, place(item + 1), item + 1 < end);
      }
    });
  }
  static void heads(const Params& p, int64_t begin, int64_t end, void* scratch) {
    char* memory = static_cast<char*>(scratch);
    with_dtype(p.dtype, [&](auto e) {
      for (int64_t item = begin; item < end; ++item) {
        const Pass<decltype(e)> pass(p, item / p.heads, static_cast<int>(item % p.heads), memory,
                                     memory + head_bytes(p));
        pass.begin();
        for (int sweep = 0; sweep < kSweeps; ++sweep)
          for (int line = 0, count = lines_of_map(p, sweep); line < count; ++line)
            pass.line(sweep, line, {pass.batch, pass.head, line + 1}, line + 1 < count);
      }
    });
  }
};
#define VITKERNELS_POLYLINE_SWEEPS(name, Pass)                                                             \
  const Loop name[kSweeps] = {{Sweeps<Pass>::items<0>, Sweeps<Pass>::line_bytes, Sweeps<Pass>::lines<0>},  \
                              {Sweeps<Pass>::items<1>, Sweeps<Pass>::line_bytes, Sweeps<Pass>::lines<1>},  \
                              {Sweeps<Pass>::items<2>, Sweeps<Pass>::line_bytes, Sweeps<Pass>::lines<2>}}; \
  const Loop name##Heads = {head_items, Sweeps<Pass>::both_bytes, Sweeps<Pass>::heads}

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention
