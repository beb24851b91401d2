// dW = dY^T x at the stored blocks on Hopper, by asynchronous products of warpgroups over the tokens: pieces
// of 64 tokens by 64 features of dY and x come by the copy engine and lie in shared memory as they do in the
// matrices.
//
// A block of threads has 256 (or 128) rows of dW by 128 columns, and computes them all, at the rate of a
// dense product; what no block stores is thrown away. To leave out products where nothing is stored would let
// each of the others wait for the one before (ptxas' C7520). A stage is 48 KB from L2 in 1024 cycles of the
// tensor cores at their peak: 12,608 tokens of 768 by 2,304 features are 99 of them for each of 108 blocks,
// 60 us at 1.75 GHz.
#include "vitkernels/matrix_copy.h"
#include "vitkernels/tile_attention_engine.h"
#include "weight_hopper.h"

namespace vitkernels::block_sparse_linear {
namespace {

constexpr int PIECE_ROW = 128, PIECE_BYTES = HOPPER_TOKENS * PIECE_ROW;  // 64 features of 64 tokens

// Two warpgroups with ROW_PIECES times 64 rows of dW each.
template <int ROW_PIECES_>
struct WeightTile {
  static constexpr int ROW_PIECES = ROW_PIECES_, COLUMN_PIECES = HOPPER_COLUMNS / 64, THREADS = 256;
  static constexpr int ROWS = 2 * 64 * ROW_PIECES, COLUMNS = HOPPER_COLUMNS;
  // A stage's product may run until the barrier after the next one: two are on their way.
  static constexpr int PLACES = 4, STAGE_BYTES = (2 * ROW_PIECES + COLUMN_PIECES) * PIECE_BYTES;
  static constexpr int MOST_BLOCKS = ROWS / 32 * (COLUMNS / 32);
  static constexpr size_t SHARED_BYTES = PLACES * (STAGE_BYTES + sizeof(Arrival)) + MOST_BLOCKS * sizeof(int);
};

struct WeightProblem {
  const int32_t *pointers, *rows, *columns;  // of the block rows; block row and column of each stored block
  int block_rows, height, width;             // of a block, powers of two
  int height_bits, width_bits;
  int row_features, column_features;
  int strips;  // of HOPPER_COLUMNS
  int tokens, share;
};

template <class T, class R, class Tile>
VK_KERNEL void VK_LAUNCH_BOUNDS(Tile::THREADS, 1)
    hopper_weight_kernel(WeightProblem p, const VK_GRID_CONSTANT MatrixMap rows_map,
                         const VK_GRID_CONSTANT MatrixMap columns_map, R* result, int64_t result_part) {
#if defined(VK_WGMMA)
  constexpr int ROW_PIECES = Tile::ROW_PIECES, COLUMN_PIECES = Tile::COLUMN_PIECES;
  char* const ring = shared_memory();
  auto* const arrivals = reinterpret_cast<Arrival*>(ring + Tile::PLACES * Tile::STAGE_BYTES);
  int* const stored = reinterpret_cast<int*>(arrivals + Tile::PLACES);  // the tile's blocks, -1 where none is
  const int first_row = block_x() / p.strips * Tile::ROWS;
  const int first_column = block_x() % p.strips * Tile::COLUMNS;
  const int begin = block_y() * p.share, tokens = p.tokens - begin < p.share ? p.tokens - begin : p.share;
  const int stages = (tokens + HOPPER_TOKENS - 1) / HOPPER_TOKENS;

  // Only the last share ends within a stage, and what is beyond it is zero. Pieces beyond the last feature
  // are not copied: what the products find there comes to nothing that is stored.
  const auto fetch = [&](int stage) {
    if (stage >= stages || thread_x() != 0) return;
    const int place = stage % Tile::PLACES, token = begin + stage * HOPPER_TOKENS;
    char* const to = ring + place * Tile::STAGE_BYTES;
    const auto pieces = [&](int features, int most) {
      const int count = (features + 63) / 64;
      return count < most ? count : most;
    };
    const int row_pieces = pieces(p.row_features - first_row, 2 * ROW_PIECES),
              column_pieces = pieces(p.column_features - first_column, COLUMN_PIECES);
    expect_arrival(arrivals + place, (row_pieces + column_pieces) * PIECE_BYTES);
    for (int i = 0; i < row_pieces; ++i)
      copy_tile(to + i * PIECE_BYTES, rows_map, first_row + 64 * i, token, arrivals + place);
    for (int i = 0; i < column_pieces; ++i)
      copy_tile(to + (2 * ROW_PIECES + i) * PIECE_BYTES, columns_map, first_column + 64 * i, token,
                arrivals + place);
  };
  if (thread_x() == 0) prepare_arrivals(arrivals, Tile::PLACES);
  fetch(0);
  fetch(1);

  const int across = Tile::COLUMNS >> p.width_bits, top = first_row >> p.height_bits,
            left = first_column >> p.width_bits;
  const int down = Tile::ROWS >> p.height_bits,
            bottom = top + down < p.block_rows ? top + down : p.block_rows;
  for (int i = thread_x(); i < down * across; i += Tile::THREADS) stored[i] = -1;
  sync_block();
  for (int id = p.pointers[top] + thread_x(); id < p.pointers[bottom]; id += Tile::THREADS) {
    const int column = p.columns[id] - left;
    if (column >= 0 && column < across) stored[(p.rows[id] - top) * across + column] = id;
  }
  sync_block();
  const int group = warp_id() / 4;
  float sums[ROW_PIECES][Tile::COLUMNS / 2];
  VK_UNROLL
  for (auto& piece : sums) {
    VK_UNROLL
    for (float& sum : piece) sum = 0.0f;
    hold(piece);
  }
  VK_NO_UNROLL
  for (int stage = 0; stage < stages; ++stage) {
    const int place = stage % Tile::PLACES;
    wait_arrival(arrivals + place, stage / Tile::PLACES);
    // Of both warpgroups, the products up to the stage before the last are done here: their places are free.
    sync_block();
    using Features = Operand<PIECE_ROW, Major::BY_FEATURES>;
    const char* const here = ring + place * Tile::STAGE_BYTES;
    const Features rows(here + group * ROW_PIECES * PIECE_BYTES),
        columns(here + 2 * ROW_PIECES * PIECE_BYTES, PIECE_BYTES);
    wgmma_fence();
    VK_UNROLL
    for (int k = 0; k < PIECE_BYTES; k += 16 * PIECE_ROW) {
      VK_UNROLL
      for (int piece = 0; piece < ROW_PIECES; ++piece)
        wgmma<T, Tile::COLUMNS>(sums[piece], rows.advance(piece * PIECE_BYTES + k), columns.advance(k));
    }
    wgmma_commit();
    fetch(stage + 2);
    wgmma_wait<1>();
  }
  wgmma_wait<0>();

  const int g = lane_id() / 4, t = lane_id() % 4;
  R* const target = result + block_y() * result_part;
  VK_UNROLL
  for (int m = 0; m < ROW_PIECES; ++m) {
    hold(sums[m]);
    VK_UNROLL
    for (int low = 0; low < 2; ++low) {
      const int row = (group * ROW_PIECES + m) * 64 + warp_id() % 4 * 16 + g + 8 * low;
      const int* const of_row = stored + (row >> p.height_bits) * across;
      const int inside = row & (p.height - 1);
      const bool exists = first_row + row < p.row_features;
      VK_UNROLL
      for (int j = 0; j < Tile::COLUMNS / 8; ++j) {
        const int column = 8 * j + 2 * t, id = of_row[column >> p.width_bits];
        if (id < 0) continue;
        // Exactly 0 beyond the matrix, whatever the sums met there.
        const auto sum = [&](int c) {
          return exists && first_column + column + c < p.column_features ? sums[m][4 * j + 2 * low + c]
                                                                         : 0.0f;
        };
        R* const to =
            target + (((int64_t{id} << p.height_bits) + inside) << p.width_bits) + (column & (p.width - 1));
        tile_attention::store_pair<R>(to, sum(0), sum(1), 2);
      }
    }
  }
#endif
}

// log2_of() is for constants: its recursion is not to be inlined.
int bits_of(int power) {
  int bits = 0;
  while (1 << bits < power) ++bits;
  return bits;
}

}  // namespace

template <class T>
bool weight_hopper(const Params& p, const View& gradient, const Parts& parts, float* partials,
                   Stream stream) {
  const View &rows = p.transposed ? p.x : gradient, &columns = p.transposed ? gradient : p.x;
  if (!takes_matrix(rows.data, p.out_features, rows.stride[0]) ||
      !takes_matrix(columns.data, p.in_features, columns.stride[0]) || !wgmma_available())
    return false;
  const Index index(p.index, p.block_rows, p.block_cols, p.nnz);
  WeightProblem w;
  w.pointers = index.crow;
  w.rows = index.row;
  w.columns = index.col;
  w.block_rows = p.block_rows;
  w.height = p.block_height;
  w.width = p.block_width;
  w.height_bits = bits_of(p.block_height);
  w.width_bits = bits_of(p.block_width);
  w.row_features = p.out_features;
  w.column_features = p.in_features;
  w.strips = static_cast<int>(ceil_div(p.in_features, HOPPER_COLUMNS));
  w.tokens = static_cast<int>(p.tokens);
  w.share = static_cast<int>(parts.share);
  const auto start = [&](auto tile, auto* result) {
    using Tile = decltype(tile);
    using R = std::remove_pointer_t<decltype(result)>;
    launch(hopper_weight_kernel<T, R, Tile>,
           Dim3{ceil_div(p.out_features, Tile::ROWS) * w.strips, parts.count}, Tile::THREADS,
           Tile::SHARED_BYTES, stream, w,
           map_matrix(rows.data, p.tokens, p.out_features, rows.stride[0], HOPPER_TOKENS),
           map_matrix(columns.data, p.tokens, p.in_features, columns.stride[0], HOPPER_TOKENS), result,
           p.nnz * p.block_height * p.block_width);
  };
  const auto with_result = [&](auto* result) {
    hopper_rows(p) == 256 ? start(WeightTile<2>{}, result) : start(WeightTile<1>{}, result);
  };
  parts.count == 1 ? with_result(static_cast<T*>(p.grad_values.data)) : with_result(partials);
  return true;
}

template bool weight_hopper<half_t>(const Params&, const View&, const Parts&, float*, Stream);
template bool weight_hopper<bfloat16_t>(const Params&, const View&, const Parts&, float*, Stream);

}  // namespace vitkernels::block_sparse_linear
