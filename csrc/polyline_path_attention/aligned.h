// The whole mode's masks where the map is so narrow that each of its rows takes 8 or 16 slots of a tile.
//
// Then a block of 8 keys lies in one row of the map, at columns that depend on the lane alone, and so do the
// queries of a lane. Of the mask with its corner in the own row, own corner in field.h, the part along the
// row is the same for all rows of keys: a register. The part down the column is the same for all queries of a
// row. Of the other mask the part down the column is one number for a query and a row of keys. What is left
// per logit are two to four operations, where tiles that rows straddle take about twelve and a look into a
// slab.
#pragma once
#include "tiles.h"

namespace vitkernels::polyline_path_attention {

// Slots of a row of the map, 0 where it is too wide, or where the empty slots would cost more than they save.
inline int row_slots(const Params& params, int rows) {
  const int64_t slots = params.width <= 8 ? 8 : 16,
                tokens = static_cast<int64_t>(params.height) * params.width;
  if (params.width > 16) return 0;
  const int64_t tiles = (params.height * slots + rows - 1) / rows, packed = (tokens + rows - 1) / rows;
  return tiles * tiles <= 2 * packed * packed ? static_cast<int>(slots) : 0;
}

// A tile's sums: [0] along the rows, -inf where a slot has no token, and [1] down the columns.
template <int ROWS>
using AlignedSums = float[2][ROWS];

template <class T, int ROWS>
VK_DEVICE void load_sums(AlignedSums<ROWS>& tile, const Field& field, const Sums<T>& sums, int slot,
                         int token) {
  const int index = token < 0 ? 0 : field.index(token);
  tile[0][slot] = token < 0 ? -INFINITY : Sums<T>::scaled(sums.along[index]);
  tile[1][slot] = token < 0 ? 0.0f : Sums<T>::scaled(sums.down[index]);
}

// Scores of 16 own rows to the logits of a mask. Slots without a token get -inf; rows without one are
// anything.
template <int ROW_SLOTS, int ROWS>
struct AlignedLogits {
  static constexpr int BLOCKS = ROW_SLOTS / 8, MAP_ROWS = ROWS / ROW_SLOTS;
  // Sixteen queries are of one row of the map, or of two.
  static constexpr int OWN_ROWS = ROW_SLOTS == 8 ? 2 : 1;
  int y[OWN_ROWS], column[2];
  float down[2];                         // the own sums down the column
  float along[2][BLOCKS][2];             // the own corner's decay along the row, to the lane's keys
  float near_down[OWN_ROWS][BLOCKS][2];  // the own row's sums down those keys' columns
  float side[2];  // 1, or -1 before the keys; of keys and queries 8 slots apart it is known

  template <class T>
  VK_DEVICE void stand(const Field& field, const Sums<T>& sums, int, int tile, int lane_row) {
    const int first = lane_id() % 4 * 2;
    VK_UNROLL
    for (int c = 0; c < 2; ++c) side[c] = lane_id() / 4 < first + c ? -1.0f : 1.0f;
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int slot = tile * ROWS + lane_row + 8 * r, row = slot / ROW_SLOTS;
      y[r % OWN_ROWS] = row;
      column[r] = slot % ROW_SLOTS;
      const int begin = row * field.width;
      const bool real = row < field.height && column[r] < field.width;
      down[r] = real ? Sums<T>::scaled(sums.down[begin + column[r]]) : 0.0f;
      const float here = real ? Sums<T>::scaled(sums.along[begin + column[r]]) : 0.0f;
      VK_UNROLL
      for (int b = 0; b < BLOCKS; ++b) {
        VK_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int key = 8 * b + first + c;
          const bool exists = row < field.height && key < field.width;
          along[r][b][c] =
              exists ? side_of(r, b, c) * (here - Sums<T>::scaled(sums.along[begin + key])) : -INFINITY;
          near_down[r % OWN_ROWS][b][c] = exists ? Sums<T>::scaled(sums.down[begin + key]) : 0.0f;
        }
      }
    }
  }

  template <Mask MASK>
  VK_DEVICE void make(float (&p)[ROWS / 8][4], float scale, const AlignedSums<ROWS>& others, int other_tile,
                      Span seen) const {
    const int first = lane_id() % 4 * 2;
    VK_UNROLL
    for (int map_row = 0; map_row < MAP_ROWS; ++map_row) {
      const int slot = map_row * ROW_SLOTS;
      if (slot >= seen.end) continue;
      float far[2], of_query[2];
      int above[2];
      VK_UNROLL
      for (int r = 0; r < 2; ++r) {
        above[r] = y[r % OWN_ROWS] - (other_tile * MAP_ROWS + map_row);
        if (MASK == Mask::own) continue;
        far[r] = others[0][slot + column[r]];
        of_query[r] = signed_by(above[r], down[r] - others[1][slot + column[r]]);
      }
      VK_UNROLL
      for (int b = 0; b < BLOCKS; ++b) {
        const auto keys = Vec<float, 2>::load(&others[MASK == Mask::own ? 1 : 0][slot + 8 * b + first]);
        VK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int r = i / 2, c = i % 2;
          float& logit = p[map_row * BLOCKS + b][i];
          if constexpr (MASK == Mask::own) {
            const float of_column = signed_by(above[r], near_down[r % OWN_ROWS][b][c] - keys[c]);
            logit = logit * scale + (along[r][b][c] + of_column);
          } else {
            logit = (logit * scale + of_query[r]) + side_of(r, b, c) * (far[r] - keys[c]);
          }
        }
      }
    }
  }

 private:
  VK_DEVICE float side_of(int r, int b, int c) const {
    return ROW_SLOTS == 8 || r == b ? side[c] : r > b ? 1.0f : -1.0f;
  }
};

}  // namespace vitkernels::polyline_path_attention
