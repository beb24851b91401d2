// What a block of threads of the product works on: tiles of outputs, the walk through the blocks stored for
// them, and the loads of its steps.
//
// Everything counts in tiles of 16, those of an mma: a block row of `out` outputs is ceil(out / 16) tiles, so
// that tiles never straddle block rows and any block size will do; a block is walked in steps of 16 of the
// features that are summed over. A step belongs to one block column, in ascending order; a mask says which of
// the tiles store a block there.
#pragma once
#include <climits>

#include "elements.h"
#include "vitkernels/chunk_order.h"
#include "vitkernels/divide.h"

namespace vitkernels::block_sparse_linear {

template <class T>
struct Config {
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int WIDTH = block_sparse_linear::WIDTH<T>;
  static constexpr int STEPS = HALF ? 2 : 1;  // of a stage of the pipeline
  static constexpr int DEPTH = 16 * STEPS;
  static constexpr int STAGES = sizeof(T) == 8 ? 2 : 3;
  static constexpr int LD = DEPTH + WIDTH;  // keeps ldmatrix and vector loads free of conflicts
};

// BY_ROWS: outputs are block rows, sums run over block columns; else the other way round, with the index of
// the transpose.
template <class T>
struct Problem {
  const T *x, *values, *bias;
  T *y, *before;
  int64_t x_row, y_row, before_row, tokens;
  const int32_t *pointers, *indices, *ids;  // ids[i]: the stored block at place i; null where that is i
  int taken, given;                         // features of x and y
  int depth, out;                           // of a block: features summed over, outputs
  int tiles, groups;                        // of outputs in all; of tiles, one a block of threads
  Divisor tiles_of_row;
  Activation activation;
  bool x_vectors, weight_vectors, y_vectors, before_vectors;  // 16-byte accesses are aligned and whole
};

constexpr int NONE = INT_MAX;

struct Step {
  int place;   // the first of its 16 features
  int count;   // how many of them exist
  int inside;  // the first one's place inside its block
  int id;      // of the block that this lane's tile stores there, if its bit in mask is set
  int mask;    // 0 when there is no step left
};

// Lane l stands for tile l % TILES. The index is read one block ahead of its use.
template <int TILES>
class Walk {
 public:
  template <class T>
  VK_DEVICE Walk(const Problem<T>& p, int first_tile)
      : indices_(p.indices), ids_(p.ids), tile_(lane_id() % TILES), inside_(p.depth) {
    const int tile = first_tile + tile_;
    if (tile < p.tiles) {
      const int row = p.tiles_of_row.divide(tile);
      next_ = p.pointers[row];
      end_ = p.pointers[row + 1];
    }
    fetch();
    advance();
  }

  template <class T>
  VK_DEVICE Step next(const Problem<T>& p) {
    inside_ += 16;
    if (inside_ >= p.depth) {
      if (column_ == current_) advance();
      current_ = column_;
      VK_UNROLL
      for (int lanes = TILES / 2; lanes > 0; lanes /= 2) {
        const int other = shfl_xor(current_, lanes);
        current_ = other < current_ ? other : current_;
      }
      mask_ = column_ == current_ && current_ != NONE ? 1 << tile_ : 0;
      VK_UNROLL
      for (int lanes = TILES / 2; lanes > 0; lanes /= 2) mask_ |= shfl_xor(mask_, lanes);
      inside_ = 0;
    }
    const int place = mask_ != 0 ? current_ * p.depth + inside_ : 0;
    const int in_block = p.depth - inside_, in_matrix = p.taken - place;
    const int rest = in_block < in_matrix ? in_block : in_matrix;
    return {place, rest < 16 ? rest : 16, inside_, id_, mask_};
  }

 private:
  VK_DEVICE void advance() {
    column_ = ahead_;
    id_ = ahead_id_;
    if (column_ != NONE) fetch();
  }
  VK_DEVICE void fetch() {
    ahead_ = NONE;
    if (next_ < end_) {
      ahead_ = indices_[next_];
      ahead_id_ = ids_ == nullptr ? next_ : ids_[next_];
      ++next_;
    }
  }

  const int32_t *indices_, *ids_;
  int next_ = 0, end_ = 0;             // of this tile's block row, what is to be read
  int tile_, column_ = NONE, id_ = 0;  // of this tile's block row
  int ahead_ = NONE, ahead_id_ = 0;    // the one after
  int current_ = -1, inside_, mask_ = 0;
};

// Hands the product to Hopper's warpgroups (warpgroup_product.h) where they can take it, and says whether.
template <class T>
bool warpgroup_product(const Params& params, Problem<T> p, bool by_rows, void* workspace, Stream stream);

// steps[which], without an array indexed at run time.
template <int STEPS>
VK_DEVICE Step pick(const Step (&steps)[STEPS], int which) {
  static_assert(STEPS == 1 || STEPS == 2);
  return which == 0 ? steps[0] : steps[STEPS - 1];
}

// The first output of a tile, its place inside its block, and how many outputs it has (not positive: none).
struct OutputTile {
  int first, inside, count;

  template <class T>
  VK_DEVICE OutputTile(const Problem<T>& p, int tile) {
    const int row = p.tiles_of_row.divide(tile);
    inside = (tile - row * p.tiles_of_row.value()) * 16;
    first = row * p.out + inside;
    const int in_block = p.out - inside, in_matrix = p.given - first;
    count = tile >= p.tiles ? 0 : in_block < in_matrix ? in_block : in_matrix;
  }
};

// The columns of x that the steps of a stage take, [TOKENS][LD], zeros where there is none.
template <int TOKENS, int THREADS, class T>
VK_DEVICE void load_tokens(T* tile, const Problem<T>& p, int64_t first_token,
                           const Step (&steps)[Config<T>::STEPS]) {
  using C = Config<T>;
  constexpr int CHUNKS = C::DEPTH / C::WIDTH;
  static_assert(CHUNKS >= 8 || THREADS / CHUNKS % 8 == 0);
  const auto order = ChunkOrder::of(log2_of(CHUNKS));
  const int chunk = order.chunk(thread_x()), column = chunk * C::WIDTH % 16;
  const Step step = pick(steps, chunk * C::WIDTH / 16);
  if (step.mask == 0) return;
  const int count = step.count - column;
  const T* from = p.x + step.place + column;
  VK_UNROLL
  for (int row = order.row(thread_x()); row < TOKENS; row += THREADS / CHUNKS) {
    const int64_t token = first_token + row;
    const bool valid = token < p.tokens && count > 0;
    load_chunk(tile + row * C::LD + chunk * C::WIDTH, valid ? from + token * p.x_row : p.x, valid ? count : 0,
               p.x_vectors);
  }
}

// The blocks that the tiles store at the steps of a stage, each lane those of its own tile: [16 TILES][LD]
// BY_ROWS, else [DEPTH][16 TILES + WIDTH]. Where a tile stores none its place is left as it was.
template <bool BY_ROWS, int TILES, int WARPS, class T>
VK_DEVICE void load_weights(T* weights, const Problem<T>& p, const OutputTile& mine,
                            const Step (&steps)[Config<T>::STEPS]) {
  using C = Config<T>;
  constexpr int LANES = 32 / TILES;  // of a warp that share a tile
  constexpr int CHUNKS = (BY_ROWS ? C::DEPTH : 16) / C::WIDTH, ROWS = WARPS * LANES / CHUNKS;
  static_assert(WARPS * LANES % CHUNKS == 0);
  const int tile = lane_id() % TILES, visitor = warp_id() * LANES + lane_id() / TILES;
  const int chunk = visitor % CHUNKS;
  if constexpr (BY_ROWS) {
    const int column = chunk * C::WIDTH % 16;
    const Step step = pick(steps, chunk * C::WIDTH / 16);
    if ((step.mask >> tile & 1) == 0) return;
    const T* block = p.values + (static_cast<int64_t>(step.id) * p.out + mine.inside) * p.depth;
    const int count = step.count - column;
    VK_UNROLL
    for (int i = visitor / CHUNKS; i < 16; i += ROWS) {
      const int row = (i + tile) % 16;  // so that the lanes of different tiles write to different banks
      const bool valid = row < p.out - mine.inside && count > 0;
      load_chunk(weights + (16 * tile + row) * C::LD + chunk * C::WIDTH,
                 valid ? block + static_cast<int64_t>(row) * p.depth + step.inside + column : p.values,
                 valid ? count : 0, p.weight_vectors);
    }
  } else {
    constexpr int LD = 16 * TILES + C::WIDTH;
    const int column = (chunk ^ (tile / 4 % CHUNKS)) * C::WIDTH;  // as above
    const int count = p.out - mine.inside - column;
    VK_UNROLL
    for (int i = visitor / CHUNKS; i < C::DEPTH; i += ROWS) {
      const Step step = pick(steps, i / 16);
      if ((step.mask >> tile & 1) == 0) continue;
      const int row = i % 16;
      const bool valid = row < step.count && count > 0;
      const int64_t at = (static_cast<int64_t>(step.id) * p.depth + step.inside + row) * p.out;
      load_chunk(weights + i * LD + 16 * tile + column,
                 valid ? p.values + at + mine.inside + column : p.values, valid ? count : 0,
                 p.weight_vectors);
    }
  }
}

}  // namespace vitkernels::block_sparse_linear
