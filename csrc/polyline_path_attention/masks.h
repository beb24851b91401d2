// The masks of the whole mode by tensor cores.
//
// Between tokens u and w of the own and the other tile, with along(u, c) what lies between u and column c of
// its row and down(u, r) what lies between it and row r of its column,
//   own corner    along(u, w.x) + down(w, u.y)        other corner    down(u, w.y) + along(w, u.x)
// so each mask is a product of two matrices, of a row for each token: values against the unit vectors that
// pick one of them. A value is the sum of two in T: 16 bits of it in bf16, 22 in f16, more than those of the
// probabilities. Both operands are as deep as twice the columns of the map and the rows that a tile touches;
// a logit then costs no instruction of its own, against some sixty where the sums are looked up for each.
#pragma once
#include "tiles.h"

namespace vitkernels::polyline_path_attention {

// Deeper products take more shared memory than they are worth.
constexpr int MOST_MASK_DEPTH = 96;

inline int mask_depth(const Field& field, int rows) {
  return round_up(2 * (field.width + field.touched_rows(rows)), 16);
}

// LINE: along(token, every column) and the unit vector of its row among those that its tile touches; else the
// unit vector of its column and down(token, every row that the tile `across` touches). Zeros where there is
// no token.
template <bool LINE, int ROWS, class T>
VK_DEVICE void fill_mask_tile(T* tile, int ld, int depth, const Field& field, int index, int across,
                              const Vec<float, 2>* slab, const Vec<float, 2>* across_slab, int thread,
                              int threads) {
  // What is below cannot be told from zero probability, and f16 holds it.
  constexpr float LEAST = -3e4f;
  constexpr int SHARERS = 2;  // threads of a row
  const int width = field.width, terms = width + field.touched_rows(ROWS), filled = field.filled(ROWS, index);
  const int begin = field.slab_begin(ROWS, index), across_begin = field.slab_begin(ROWS, across);
  const int across_rows = field.by_width.divide(field.slab_length(ROWS, across));
  const int top = field.by_width.divide(begin), across_top = field.by_width.divide(across_begin);
  VK_NO_UNROLL
  for (int e = thread; e < SHARERS * ROWS; e += threads) {
    const int slot = e / SHARERS, sharer = e % SHARERS;
    const int token = index * ROWS + slot, y = field.by_width.divide(token), x = token - y * width;
    const bool there = slot < filled;
    const Vec<float, 2>* own = slab + (there ? token - begin : 0);
    const Vec<float, 2>* line = slab + (there ? y * width - begin : 0);
    T* const row = tile + slot * ld;
    VK_NO_UNROLL
    for (int c = sharer; c < terms; c += SHARERS) {
      float value = 0.0f, unit = 0.0f;
      if (there) {
        if (LINE == (c < width)) {
          if (LINE) {
            value = signed_by(x - c, (*own)[0] - line[c][0]);
          } else if (c - width < across_rows) {
            value =
                signed_by(y - across_top - (c - width), (*own)[1] - across_slab[(c - width) * width + x][1]);
          }
        } else {
          unit = c == (LINE ? width + y - top : x) ? 1.0f : 0.0f;
        }
      }
      value = value < LEAST ? LEAST : value;
      const T high = from_float<T>(value);
      row[c] = unit != 0.0f ? from_float<T>(1.0f) : high;
      row[terms + c] = from_float<T>(unit != 0.0f ? 1.0f : value - to_float(high));
    }
    for (int c = 2 * terms + sharer; c < depth; c += SHARERS) row[c] = from_float<T>(0.0f);
  }
}

// Both operands of both products in shared memory.
template <class Engine>
struct MaskTiles {
  using T = typename Engine::T;
  static constexpr int ROWS = Engine::ROWS;
  int depth = 0, ld = 0;
  int own_line = 0, own_column = 0, other_line = 0, other_column = 0;

  MaskTiles() = default;
  MaskTiles(Carver& carver, const Field& field)
      : depth(mask_depth(field, ROWS)), ld(leading_dimension<T>(depth)) {
    for (int* tile : {&own_line, &own_column, &other_line, &other_column}) *tile = carver.take<T>(ROWS * ld);
  }

  // Of own tile `own` alone, and of what depends on the other tile. The slabs are there for all.
  VK_DEVICE void fill_own(char* base, const Field& field, int own, const Vec<float, 2>* slab,
                          const Group<ROWS>& group) const {
    fill_mask_tile<true, ROWS>(at(base, own_line), ld, depth, field, own, own, slab, slab, group.thread,
                               Group<ROWS>::THREADS);
  }
  VK_DEVICE void fill_others(char* base, const Field& field, int own, int other,
                             const Vec<float, 2>* own_slab, const Vec<float, 2>* other_slab,
                             const Group<ROWS>& group) const {
    constexpr int THREADS = Group<ROWS>::THREADS;
    fill_mask_tile<false, ROWS>(at(base, own_column), ld, depth, field, own, other, own_slab, other_slab,
                                group.thread, THREADS);
    fill_mask_tile<true, ROWS>(at(base, other_line), ld, depth, field, other, other, other_slab, other_slab,
                               group.thread, THREADS);
    fill_mask_tile<false, ROWS>(at(base, other_column), ld, depth, field, other, own, other_slab, own_slab,
                                group.thread, THREADS);
  }

  // first and second = scale * first + the masks with their corners in the own row and in the other.
  VK_DEVICE void add(float (&first)[ROWS / 8][4], float (&second)[ROWS / 8][4], float scale, char* base,
                     int first_row, Span seen) const {
    VK_UNROLL
    for (int j = 0; j < ROWS / 8; ++j) {
      VK_UNROLL
      for (int c = 0; c < 4; ++c) second[j][c] = first[j][c] = first[j][c] * scale;
    }
    Engine::multiply_rows(first, at(base, own_line) + first_row * ld, ld, at(base, other_column), ld, depth,
                          seen);
    Engine::multiply_rows(second, at(base, own_column) + first_row * ld, ld, at(base, other_line), ld, depth,
                          seen);
  }

 private:
  static VK_DEVICE T* at(char* base, int offset) { return reinterpret_cast<T*>(base + offset); }
};

// run(Form), which holds `columns` channels and, as bytes_of(Form) says, fits into shared memory. Only tensor
// cores are worth more than one kernel.
template <class Engine, bool WHOLE, class Bytes, class Run>
void with_form(const Field& field, int columns, Bytes bytes_of, Run run) {
  if constexpr (sizeof(typename Engine::T) != 2) {
    run(Form<WHOLE>());
  } else if constexpr (WHOLE) {
    using Products = Form<true, true, MOST_COLUMNS, true>;
    if (mask_depth(field, Engine::ROWS) <= MOST_MASK_DEPTH &&
        bytes_of(Products()) <= tile_attention::SHARED_LIMIT) {
      run(Products());
    } else {
      run(Form<true>());
    }
  } else if (field.slots < Engine::ROWS) {
    run(Form<false>());
  } else if (columns > 16) {
    run(Form<false, true>());
  } else {
    run(Form<false, true, 16>());
  }
}

}  // namespace vitkernels::polyline_path_attention
