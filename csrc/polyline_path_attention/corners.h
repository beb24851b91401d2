// The share of the corners in the gradients of the whole mode's masks.
//
// With D the gradient of the mask whose corner (i, l) is in the own row, between an own token (i, j) and
// another (r, l), that corner's sum along the row gets -s_c D, and its sum down the column s_r D.
#pragma once
#include "field.h"

namespace vitkernels::polyline_path_attention {

// Adds to the corners in the own tile's rows what the gradients of one mask between two tiles give them. A
// thread owns corner e throughout, so that no two threads add to one; own tokens and others in index order.
template <int ROWS, class Acc>
VK_DEVICE void add_corners(Vec<Acc, 2>* corners, const Acc* gradient, int ld, const Field& field,
                           int own_tile, int other_tile, int thread, int threads) {
  const int own_first = own_tile * ROWS, other_first = other_tile * ROWS;
  const int own_count = field.filled(ROWS, own_tile), other_count = field.filled(ROWS, other_tile);
  const int begin = field.slab_begin(ROWS, own_tile), length = field.slab_length(ROWS, own_tile);
  const int other_y = field.by_width.divide(other_first), other_x = other_first - other_y * field.width;
  VK_NO_UNROLL
  for (int e = thread; e < length; e += threads) {
    const int row = field.by_width.divide(e) * field.width, column = e - row;
    const int row_slot = begin + row - own_first;  // of the row's first token, perhaps before the tile
    const int from = row_slot > 0 ? row_slot : 0;
    const int to = row_slot + field.width < own_count ? row_slot + field.width : own_count;
    int same = row_slot + column;  // the own token in this column
    const int upper = same < from ? from : same < to ? same : to;
    const int lower = same + 1 > upper ? same + 1 : upper;
    const int own_y = field.by_width.divide(begin + e);
    int slot = column - other_x, y = other_y;
    if (slot < 0) slot += field.width, ++y;
    Vec<Acc, 2> sum = corners[e];
    VK_NO_UNROLL
    for (; slot < other_count; slot += field.width, ++y) {
      const Acc* of_other = gradient + slot;
      Acc before = Acc(0), after = Acc(0), level = Acc(0);
      for (int s = from; s < upper; ++s) before += of_other[s * ld];
      if (same >= from && same < to) level = of_other[same * ld];
      for (int s = lower; s < to; ++s) after += of_other[s * ld];
      sum[0] += before - after;
      sum[1] += signed_or_zero(own_y - y, before + level + after);
    }
    corners[e] = sum;
  }
}

}  // namespace vitkernels::polyline_path_attention
