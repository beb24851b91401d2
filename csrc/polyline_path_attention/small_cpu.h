// What the forward and the backward pass over small whole maps share: the masks of one head. Compiled once
// per instruction set.
//
// All keys of a head and a tile of its queries stay in cache. Queries lie in the lanes, whatever rows they
// are of: no lane is lost at the end of a row, of which small maps have many.
#pragma once
#include "maps_cpu.h"

namespace vitkernels::polyline_path_attention {
namespace VITKERNELS_ISA {

template <class T>
struct SmallMap {
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;

  int height, width, tokens, padded, turn;     // turn: of a row that starts anew at its end
  T *along, *down, *along_turns, *down_turns;  // sums of decays, and by rows that turn
  T *later_columns, *near, *beside;            // [l][lane] of a vector of queries

  SmallMap(const Params& p, const Tiling<T>& tiling, Scratch& scratch)
      : height(p.height),
        width(p.width),
        tokens(p.height * p.width),
        padded(tiling.count * tiling.width),
        turn(p.width + L) {
    T** const planes[] = {&along, &down};
    for (T** plane : planes) *plane = scratch.take<T>(padded);
    T** const turning[] = {&along_turns, &down_turns};
    for (T** plane : turning) *plane = scratch.take<T>(static_cast<size_t>(height) * turn);
    T** const by_columns[] = {&later_columns, &near, &beside};
    for (T** vectors : by_columns) *vectors = scratch.take<T>(static_cast<size_t>(width) * L);
  }

  void read(const Params& p, int64_t batch, int head) const {
    for (int which = 0; which < 2; ++which) {
      const T* cum = plane<const T>(p.cum, which, batch, head);
      T *sum = which ? down : along, *turned = which ? down_turns : along_turns;
      for (int i = 0; i < tokens; ++i) sum[i] = cum[i];
      for (int i = tokens; i < padded; ++i) sum[i] = cum[tokens - 1];
      for_turns([&](int y, int begin, int count) {
        for (int x = 0; x < count; ++x) turned[y * turn + begin + x] = sum[y * width + x];
      });
    }
  }
  // visit(y, begin, count): where in a row that turns its first `count` columns come again.
  template <class Visit>
  void for_turns(Visit visit) const {
    for (int y = 0; y < height; ++y)
      for (int begin = 0; begin < turn; begin += width) visit(y, begin, imin(width, turn - begin));
  }

  // L queries from `first` on, of which the last may lie beyond the map.
  struct Queries {
    int first, row, column;  // of the first
    IntVec<T> rows, columns;
  };
  // Finds them, and what of their masks depends on their columns and the keys' alone.
  Queries find(int first) const {
    Queries at{first, first / width, first % width, {}, {}};
    for (int i = 0, row = at.row, column = at.column; i < L; ++i) {
      at.rows[i] = imin(row, height - 1);
      at.columns[i] = column;
      if (++column == width) column = 0, ++row;
    }
    const V own = load(along + first);
    for (int l = 0; l < width; ++l) {
      const V later = towards<T>(broadcast(T(1)), at.columns, l);
      store(later_columns + l * L, later);
      store(near + l * L, later * (own - at_column(along, l, at)));
      store(beside + l * L, at_column(down, l, at));
    }
    return at;
  }
  // The values that `plane` has at column l of each lane's row.
  V at_column(const T* plane, int l, const Queries& at) const {
    V x = broadcast(plane[at.row * width + l]);
    for (int row = at.row + 1, lane = width - at.column; lane < L && row < height; ++row, lane += width)
      x = at.rows >= static_cast<typename Bits<T>::type>(row) ? broadcast(plane[row * width + l]) : x;
    return x;
  }

  // Both masks of the queries for row r of keys. A copy, since stores might change what is behind a pointer.
  struct Masks {
    V later, fall, there;
    const T *row_along, *row_down, *later_columns, *near, *beside;

    // along the query's row, then down the key's column
    V first(int l) const { return load(near + l * L) + later * (load(beside + l * L) - row_down[l]); }
    // down the query's column, then along the key's row
    V second(int l) const { return fall + load(later_columns + l * L) * (there - row_along[l]); }
  };
  Masks masks(const Queries& at, int r) const {
    const V later = towards<T>(broadcast(T(1)), at.rows, r);
    return {later,
            later * (load(down + at.first) - load(down_turns + r * turn + at.column)),
            load(along_turns + r * turn + at.column),
            along + static_cast<ptrdiff_t>(r) * width,
            down + static_cast<ptrdiff_t>(r) * width,
            later_columns,
            near,
            beside};
  }
};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::polyline_path_attention
