// One tile of queries of a group: up to kRows rows, one vector of columns. Compiled once per instruction set.
#pragma once
#include "shifted_cpu.h"

namespace vitkernels::neighborhood_attention {
namespace VITKERNELS_ISA {

// Arrays over (query, key) pairs are [query row][key row of its window][shift][lane]; arrays over (query,
// channel) pairs are [query row][channel][lane].
template <class T>
struct Tile {
  static constexpr int L = kLanes<T>;
  Axis y, x;
  int y0, rows, x0, lanes;
  int low, shifts;  // shifts are [low, low + shifts)
  const T* mask;    // [shift][lane], all bits or none; null: every lane sees every shift
  int first[kRows], last[kRows];

  // `memory` is for the mask: [2 * kernel - 1][lane].
  Tile(const Group& g, int y0, int rows, int x0, T* memory)
      : y(g.y), x(g.x), y0(y0), rows(rows), x0(x0), lanes(imin(L, g.x.size - x0)) {
    for (int r = 0; r < rows; ++r) first[r] = y.first(y0 + r), last[r] = y.last(y0 + r);
    int from[L], to[L], high = 0;
    low = 0;
    for (int i = 0; i < lanes; ++i) {
      from[i] = x.first(x0 + i) - x0 - i;
      to[i] = x.last(x0 + i) - x0 - i;
      low = imin(low, from[i]);
      high = to[i] > high ? to[i] : high;
    }
    shifts = high - low;
    bool uniform = lanes == L;
    for (int i = 0; i < lanes; ++i) uniform = uniform && from[i] == low && to[i] == high;
    mask = uniform ? nullptr : memory;
    if (uniform) return;
    using Bit = typename Bits<T>::type;
    for (int j = 0; j < shifts; ++j) {
      IntVec<T> pass = {};
      for (int i = 0; i < lanes; ++i)
        pass[i] = static_cast<Bit>(low + j >= from[i] && low + j < to[i] ? -1 : 0);
      store(memory + j * L, bit_cast<Vec<T>>(pass));
    }
  }

  int keys(int r) const { return (last[r] - first[r]) * shifts; }
  T* row(T* s, int r) const { return s + static_cast<ptrdiff_t>(r) * y.kernel * shifts * L; }
  T* at(T* s, int r, int key_row) const {
    return row(s, r) + static_cast<ptrdiff_t>(key_row - first[r]) * shifts * L;
  }

  // Calls visit(key row, first query row, query rows) for all rows of keys and the query rows that see them,
  // at most `most` at a time.
  template <class Visit>
  __attribute__((always_inline)) void pairs(int most, Visit visit) const {
    for (int key = first[0], begin = 0, end = 0; key < last[rows - 1]; ++key) {
      while (end < rows && first[end] <= key) ++end;
      while (last[begin] <= key) ++begin;
      int r = begin;
      for (int blocks = ceil_div(end - begin, most); blocks > 0; --blocks) {
        const int count = ceil_div(end - r, blocks);
        visit(key, r, count);
        r += count;
      }
    }
  }
  void pointers(T** to, T* s, int r, int count, int key) const {
    for (int i = 0; i < count; ++i) to[i] = at(s, r + i, key);
  }

  // s = a . b, a [query row][channel][lane]
  void correlate(T* s, const T* a, const Ring<T>& b) const {
    const ptrdiff_t a_row = static_cast<ptrdiff_t>(b.channels) * L;
    pairs(kBlockRows, [&](int key, int r, int count) {
      T* to[kBlockRows];
      pointers(to, s, r, count, key);
      const T *from = a + r * a_row, *keys = b.row(key) + x0 + low;
      if (count == 4) correlate_rows<T, 4>(from, a_row, keys, b.pitch, b.channels, to, shifts);
      if (count == 3) correlate_rows<T, 3>(from, a_row, keys, b.pitch, b.channels, to, shifts);
      if (count == 2) correlate_rows<T, 2>(from, a_row, keys, b.pitch, b.channels, to, shifts);
      if (count == 1) correlate_rows<T, 1>(from, a_row, keys, b.pitch, b.channels, to, shifts);
    });
  }

  // out = sum over keys of s * b
  void accumulate(T* out, T* s, const Ring<T>& b) const {
    const ptrdiff_t out_row = static_cast<ptrdiff_t>(b.channels) * L;
    for (ptrdiff_t i = 0; i < rows * out_row; i += L) store(out + i, Vec<T>{});
    pairs(kBlockRows, [&](int key, int r, int count) {
      T* from[kBlockRows];
      pointers(from, s, r, count, key);
      T* to = out + r * out_row;
      const T* keys = b.row(key) + x0 + low;
      if (count == 4) accumulate_rows<T, 4>(from, mask, keys, b.pitch, b.channels, shifts, to, out_row);
      if (count == 3) accumulate_rows<T, 3>(from, mask, keys, b.pitch, b.channels, shifts, to, out_row);
      if (count == 2) accumulate_rows<T, 2>(from, mask, keys, b.pitch, b.channels, shifts, to, out_row);
      if (count == 1) accumulate_rows<T, 1>(from, mask, keys, b.pitch, b.channels, shifts, to, out_row);
    });
  }

  // b += sum over queries of s * a: the transpose of accumulate
  void scatter(const Ring<T>& b, T* s, const T* a) const {
    const ptrdiff_t a_row = static_cast<ptrdiff_t>(b.channels) * L;
    pairs(kRows, [&](int key, int r, int count) {
      T* from[kRows];
      pointers(from, s, r, count, key);
      scatter_rows<T, kRows>(count, from, mask, a + r * a_row, a_row, b.channels, shifts,
                             b.row(key) + x0 + low, b.pitch);
    });
  }

  // Calls visit(pointer into s, entry of the bias or of its gradient, shift) for the pairs of one query row.
  template <class Visit>
  __attribute__((always_inline)) void entries(T* s, int r, Visit visit) const {
    const int columns = 2 * x.kernel - 1;
    int entry = (first[r] - y0 - r + y.kernel - 1) * columns + low + x.kernel - 1;
    T* at = row(s, r);
    for (int key = first[r]; key < last[r]; ++key, entry += columns)
      for (int j = 0; j < shifts; ++j, at += L) visit(at, entry + j, j);
  }
  IntVec<T> pass(int shift) const { return bit_cast<IntVec<T>>(load(mask + shift * L)); }

  // Adds the bias and masks; returns the largest logit of each lane, NaN where none is a number.
  Vec<T> finish_logits(T* s, int r, const T* bias) const {
    const Vec<T> nothing = broadcast(-static_cast<T>(__builtin_inff()));
    Vec<T> top = broadcast(static_cast<T>(__builtin_nanf("")));
    entries(s, r, [&](T* at, int entry, int shift) {
      Vec<T> value = load(at);
      if (bias) value += broadcast(bias[entry]);
      if (mask) {
        const IntVec<T> seen = pass(shift);
        top = vmax(top, seen ? value : top);
        value = seen ? value : nothing;
      } else {
        top = vmax(top, value);  // value where top is NaN still
      }
      if (bias || mask) store(at, value);
    });
    return top;
  }

  // s <- e^(s - max), inverse <- 1 / sum of that, lse <- max + log(sum), each of one query row.
  void softmax(T* s, int r, const T* bias, T* inverse, T* lse) const {
    const Vec<T> nothing = broadcast(-static_cast<T>(__builtin_inff()));
    const Vec<T> top = finish_logits(s, r, bias);
    Vec<T> sum = {};
    T* at = row(s, r);
    for (int i = 0, n = keys(r); i < n;) {
      Vec<T> run = {};
      for (const int end = imin(n, i + kRun); i < end; ++i, at += L) {
        const Vec<T> e = exp_softmax<T>(load(at) - top);
        store(at, e);
        run += e;
      }
      sum += run;
    }
    store(inverse, T(1) / sum);
    const Vec<T> value = top + log_softmax<T>(sum);
    store(lse, top == nothing ? top : value);  // -inf, not NaN, where every logit is -inf
  }

  // s <- the probabilities, and dl <- those times (dl - mean - rest), mean being the sum of s * dl.
  // Probabilities are e^(s - lse) made to sum to 1: lse is rounded, and its error would scale a whole row of
  // them.
  void probabilities(T* s, T* dl, int r, const T* bias, Vec<T> lse, Vec<T> rest) const {
    T *p = row(s, r), *d = dl ? row(dl, r) : nullptr;
    Vec<T> sum = {}, mean = {}, sum_run = {}, mean_run = {};
    int left = kRun;
    entries(s, r, [&](T* at, int entry, int shift) {
      Vec<T> value = load(at);
      if (bias) value += broadcast(bias[entry]);
      value = exp_softmax<T>(value - lse);
      if (mask) value = pass(shift) ? value : Vec<T>{};
      store(at, value);
      sum_run += value;
      if (dl) {
        T* to = d + (at - p);
        Vec<T> g = load(to);
        if (mask) {
          g = pass(shift) ? g : Vec<T>{};
          store(to, g);
        }
        mean_run += value * g;
      }
      if (--left == 0) {
        sum += sum_run;
        mean += mean_run;
        sum_run = mean_run = Vec<T>{};
        left = kRun;
      }
    });
    sum += sum_run;
    // A lane beyond the last query has no probabilities.
    const Vec<T> inverse = sum == T(0) ? Vec<T>{} : T(1) / sum;
    mean = (mean + mean_run) * inverse;
    for (int i = 0, n = keys(r); i < n; ++i) {
      const Vec<T> value = load(p + i * L) * inverse;
      store(p + i * L, value);
      if (dl) store(d + i * L, value * ((load(d + i * L) - mean) - rest));
    }
  }
};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::neighborhood_attention
