// The cumulative sums of the decays, and the way back from the gradients of the sums.
#pragma once
#include "field.h"

namespace vitkernels::polyline_path_attention {

// What the backward kernels leave of the gradients of the cumulative sums, in Acc, for each direction: along
// the rows, down the columns.
struct SumGradients {
  // [batch, heads, height, width], of the tokens as queries and as keys
  const void* of_tokens[2][2] = {};  // [direction][side]
  // Whole: of the corners in the rows of a tile of queries, and of keys; [batch, heads, tiles, capacity]
  // pairs (along, down). Absent where the tokens' have them already.
  const void* corners[2] = {};
};

// Fills params.cum.
void cumulate(const Params& params, Stream stream);
// Fills grad_log_decay_w and grad_log_decay_h, if present. `field` is that of the tiles of `rows` that the
// corners are of.
void decay_gradients(const Params& params, const SumGradients& gradients, const Field& field, int rows,
                     Stream stream);

}  // namespace vitkernels::polyline_path_attention
