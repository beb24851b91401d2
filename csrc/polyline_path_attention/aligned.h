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
  if (params.width > 16 || params.dtype == DType::f32 || params.dtype == DType::f64) return 0;
  const int64_t slots = params.width <= 8 ? 8 : 16,
                tokens = static_cast<int64_t>(params.height) * params.width;
  const int64_t tiles = (params.height * slots + rows - 1) / rows, packed = (tokens + rows - 1) / rows;
  return tiles * tiles <= 2 * packed * packed ? static_cast<int>(slots) : 0;
}

// A tile's sums: [0] along the rows, -inf where a slot has no token, and [1] down the columns.
template <int ROWS>
using AlignedSums = float[2][ROWS];

// Scores of 16 own rows to the logits of a mask. Other slots without a token get -inf, and with the own mask,
// whose gradients the tokens of a row add up, own slots too; what these have with the other mask nobody
// reads.
template <int ROW_SLOTS, int ROWS>
struct AlignedLogits {
  static constexpr int BLOCKS = ROW_SLOTS / 8, MAP_ROWS = ROWS / ROW_SLOTS;
  // Sixteen own tokens are of one row of the map, or of two.
  static constexpr int OWN_ROWS = ROW_SLOTS == 8 ? 2 : 1;
  int y[OWN_ROWS], column[2];
  float down[2];                         // the own sums down the column
  float along[2][BLOCKS][2];             // the own corner's decay along the row, to the lane's columns
  float near_down[OWN_ROWS][BLOCKS][2];  // the own row's sums down those columns
  float side[2];                         // 1, or -1 for own tokens before the column

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
      const bool real = row < field.height && column[r] < field.width;
      const int begin = row * field.width;
      down[r] = real ? Sums<T>::scaled(sums.down[begin + column[r]]) : 0.0f;
      const float here = real ? Sums<T>::scaled(sums.along[begin + column[r]]) : 0.0f;
      VK_UNROLL
      for (int b = 0; b < BLOCKS; ++b) {
        VK_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int of_column = 8 * b + first + c;
          const bool exists = row < field.height && of_column < field.width;
          near_down[r % OWN_ROWS][b][c] = exists ? Sums<T>::scaled(sums.down[begin + of_column]) : 0.0f;
          along[r][b][c] = exists && real
                               ? side_of(r, b, c) * (here - Sums<T>::scaled(sums.along[begin + of_column]))
                               : -INFINITY;
        }
      }
    }
  }

  // How far below a row of the other tile an own row lies.
  VK_DEVICE int below(int r, int tile, int map_row) const {
    return y[r % OWN_ROWS] - (tile * MAP_ROWS + map_row);
  }
  // 1, or -1 for own tokens before the column. Where both are of one block of slots it depends on the lane.
  VK_DEVICE float side_of(int r, int b, int c) const {
    return ROW_SLOTS == 8 || r == b ? side[c] : r > b ? 1.0f : -1.0f;
  }

  // Takes no slab, and the arguments of Logits::make.
  template <Mask MASK>
  VK_DEVICE void make(float (&p)[ROWS / 8][4], float scale, const Field&, const AlignedSums<ROWS>& others,
                      const Vec<float, 2>*, int tile, Span seen) const {
    const int first = lane_id() % 4 * 2;
    VK_UNROLL
    for (int map_row = 0; map_row < MAP_ROWS; ++map_row) {
      const int slot = map_row * ROW_SLOTS;
      if (slot >= seen.end) continue;
      float far[2], of_own[2];
      VK_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (MASK == Mask::own) continue;
        far[r] = others[0][slot + column[r]];
        of_own[r] = signed_by(below(r, tile, map_row), down[r] - others[1][slot + column[r]]);
      }
      VK_UNROLL
      for (int b = 0; b < BLOCKS; ++b) {
        const auto columns = Vec<float, 2>::load(&others[MASK == Mask::own ? 1 : 0][slot + 8 * b + first]);
        VK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int r = i / 2, c = i % 2;
          float& logit = p[map_row * BLOCKS + b][i];
          if constexpr (MASK == Mask::own) {
            const float of_column =
                signed_by(below(r, tile, map_row), near_down[r % OWN_ROWS][b][c] - columns[c]);
            logit = logit * scale + (along[r][b][c] + of_column);
          } else {
            logit = (logit * scale + of_own[r]) + side_of(r, b, c) * (far[r] - columns[c]);
          }
        }
      }
    }
  }
};

// What lies beside a tile of the other tokens, and what makes logits of it.
template <class Engine, class Form, bool ALIGNED = (Form::ROW_SLOTS > 0)>
struct BesideTile {
  using T = typename Engine::T;
  using Type = Beside<typename Engine::Acc, Form::WHOLE>[Engine::ROWS];
  using Logits =
      polyline_path_attention::Logits<Form::WHOLE, Form::ALONE, Engine::ROWS, typename Engine::Acc>;
  static constexpr bool SLABS = Form::WHOLE;

  VK_DEVICE static void put(Type& others, const Field& field, const Sums<T>& sums, int tile, int slot,
                            int token) {
    others[slot] = beside<Form::WHOLE>(field, sums, Engine::ROWS, tile, token);
  }
};
template <class Engine, class Form>
struct BesideTile<Engine, Form, true> {
  using T = typename Engine::T;
  using Type = AlignedSums<Engine::ROWS>;
  using Logits = AlignedLogits<Form::ROW_SLOTS, Engine::ROWS>;
  static constexpr bool SLABS = false;

  VK_DEVICE static void put(Type& others, const Field& field, const Sums<T>& sums, int, int slot, int token) {
    const int index = token < 0 ? 0 : field.index(token);
    others[0][slot] = token < 0 ? -INFINITY : Sums<T>::scaled(sums.along[index]);
    others[1][slot] = token < 0 ? 0.0f : Sums<T>::scaled(sums.down[index]);
  }
};

// The gradients of the sums at the own rows of the map: those of the own tokens, and of the corners. A corner
// in an own row is that of one warp's tokens alone.
template <int ROW_SLOTS, int ROWS>
struct AlignedGradients {
  using Logits = AlignedLogits<ROW_SLOTS, ROWS>;
  static constexpr int BLOCKS = Logits::BLOCKS, OWN_ROWS = Logits::OWN_ROWS;
  float along[2][BLOCKS][2] = {};        // the own mask's gradients, over the rows of the other tokens
  float down[OWN_ROWS][BLOCKS][2] = {};  // the same where the own row is below, less those where it is above
  float of_down[2] = {};                 // of the other mask, in the same way

  // Of a block of the other tile's slots: gradients of the logits with the own mask, and with the other.
  VK_DEVICE void add(const Logits& logits, int tile, int block, const float (&own)[4],
                     const float (&other)[4]) {
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int below = logits.below(r, tile, block / BLOCKS), b = block % BLOCKS;
      const float sign = below == 0 ? 0.0f : signed_by(below, 1.0f);
      VK_UNROLL
      for (int c = 0; c < 2; ++c) {
        along[r][b][c] += own[2 * r + c];
        down[r % OWN_ROWS][b][c] += sign * own[2 * r + c];
      }
      of_down[r] += sign * (other[2 * r] + other[2 * r + 1]);
    }
  }

  // [0] along the row, [1] down the column; of the own token of row r of the lanes, complete in all four.
  VK_DEVICE void finish(const Logits& logits, float (&result)[2][2]) const {
    const int first = lane_id() % 4 * 2, within = lane_id() / 4;
    float corners[2][2][2] = {};  // [along, down][block of slots, or own row][column]
    float tokens[2] = {};
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      VK_UNROLL
      for (int b = 0; b < BLOCKS; ++b) {
        VK_UNROLL
        for (int c = 0; c < 2; ++c) {
          const bool same = (ROW_SLOTS == 8 || r == b) && within == first + c;  // then there is no decay
          const float signed_sum = same ? 0.0f : logits.side_of(r, b, c) * along[r][b][c];
          tokens[r] += signed_sum;
          corners[0][ROW_SLOTS == 8 ? r : b][c] -= signed_sum;
        }
      }
    }
    VK_UNROLL
    for (int i = 0; i < 2; ++i) {
      VK_UNROLL
      for (int c = 0; c < 2; ++c) {
        corners[1][i][c] = ROW_SLOTS == 8 ? down[i % OWN_ROWS][0][c] : down[0][i % BLOCKS][c];
        VK_UNROLL
        for (int direction = 0; direction < 2; ++direction) {
          float& sum = corners[direction][i][c];
          VK_UNROLL
          for (int mask = 4; mask < 32; mask *= 2) sum += shfl_xor(sum, mask);
        }
      }
    }
    // The corner of a token's own column is with the lanes that have that column.
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      VK_UNROLL
      for (int direction = 0; direction < 2; ++direction) {
        const float even = shfl(corners[direction][r][0], within / 2),
                    odd = shfl(corners[direction][r][1], within / 2);
        result[direction][r] =
            warp_sum<4>(direction == 0 ? tokens[r] : of_down[r]) + (within % 2 == 0 ? even : odd);
      }
    }
  }
};

}  // namespace vitkernels::polyline_path_attention
