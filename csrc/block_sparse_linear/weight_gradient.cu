// dW = dY^T x at the stored blocks.
//
// It is computed in units of up to 32 x 32 of one stored block. The block rows are taken in groups; a block
// of threads takes the next UNITS units of a group in the order of their columns, so that units share the
// columns of dY that the group has, and of x those in which rows of the group meet. The blocks of threads are
// equal in work whatever the rows hold; where a group has fewer units than it has room for, the last find
// nothing to do. Long sums are split over tokens, the parts added in a fixed order; there are no float
// atomics.
//
// Floor: 2 N nnz bh bw FLOPs at the matrix rate; dY and x cross memory once. What bounds it is L2: with 32 x
// 32 blocks in 16 bits 16 units take 4 pieces of dY and at density 1/2 about 9 of x, 39 FLOPs a byte.
#include "elements.h"
#include "parts.h"
#include "product.h"
#include "vitkernels/divide.h"
#include "vitkernels/tile_attention_engine.h"
#include "weight_hopper.h"

namespace vitkernels::block_sparse_linear {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int OF_WARP = 2, UNITS = OF_WARP * WARPS;  // units of a warp, of a block of threads
constexpr int PIECE = 32;                            // the side of a unit, features of a piece of dY or x
// Pieces that the units of a block of threads can need: groups are made so that they have at most 8 on the
// left, or they are one row whose blocks have more, and then fewer on the right.
constexpr int LEFT_PIECES = 8, PIECES = LEFT_PIECES + UNITS, OF_LOADER = PIECES / WARPS;
constexpr int64_t PARTIAL_BYTES = int64_t{64} << 20;  // the most that partial sums may take

template <class T>
struct Config {
  static constexpr int TOKENS = static_cast<int>(64 / sizeof(T));  // of a stage
  static constexpr int CHUNKS = PIECE / WIDTH<T>;
  static constexpr int ELEMENTS = TOKENS * PIECE;  // of a piece: 2 KB
  static constexpr int STAGE = PIECES * ELEMENTS;
  static constexpr size_t SHARED = sizeof(T) * STAGE * 2;

  // Where a chunk of a token of a piece lies, eight tokens on in the same place of a later row. At 16 bits
  // rows are 64 bytes: turning the chunks lets ldmatrix find eight rows in eight different banks.
  static VK_DEVICE int place(int token, int chunk) {
    return token * PIECE + (sizeof(T) == 2 ? chunk ^ (token >> 1 & 3) : chunk) * WIDTH<T>;
  }
};

// The matrix of tokens whose features are the block rows (left) or columns (right).
template <class T>
struct Side {
  const T* data;
  int64_t row;
  const int32_t* index;         // block row or column of each stored block
  int features, block, pieces;  // pieces of a block
  bool vectors;
};

template <class T>
struct Problem {
  Side<T> left, right;
  const int32_t* pointers;  // of the block rows
  int block_rows, group;    // block rows in all, of a group
  int chunks;               // blocks of threads of a group
  Divisor units_of_block, right_pieces;
  int64_t tokens, share;
};

// What one lane knows of a unit: where its columns begin on a side, how many it has, and of those how many
// the matrix has.
struct Extent {
  int first, block, matrix;

  template <class T>
  VK_DEVICE Extent(const Side<T>& side, int id, int piece) {
    const int inside = piece * PIECE;
    first = side.index[id] * side.block + inside;
    block = side.block - inside < PIECE ? side.block - inside : PIECE;
    matrix = side.features - first < block ? side.features - first : block;
  }
};

// Writes to found[0 .. UNITS) the stored blocks of block rows [row, end) that come from place `first` on in
// the order of (column, row).
template <class T>
VK_DEVICE void find_blocks(int* found, const Problem<T>& p, int row, int end, int first) {
  VK_NO_UNROLL
  for (int id = p.pointers[row] + thread_x(); id < p.pointers[end]; id += THREADS) {
    const int column = p.right.index[id], own = p.left.index[id];
    int before = -first;
    VK_NO_UNROLL
    for (int other = row; other < end; ++other) {
      // How many blocks of that row come before this one.
      const int begin = p.pointers[other], bound = other < own ? column + 1 : column;
      int low = begin, high = p.pointers[other + 1];
      while (low < high) {
        const int middle = low + (high - low) / 2;
        if (p.right.index[middle] < bound) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      before += low - begin;
    }
    if (before >= 0 && before < UNITS) found[before] = id;
  }
}

template <class T>
VK_DEVICE void load_piece(T* piece, const Side<T>& side, int first, int count, int64_t begin, int64_t end) {
  using C = Config<T>;
  constexpr int ROWS = 32 / C::CHUNKS;  // at a time
  const int chunk = lane_id() % C::CHUNKS, row = lane_id() / C::CHUNKS, column = chunk * WIDTH<T>;
  if (column >= (side.block + 15) / 16 * 16) return;
  T* to = piece + C::place(row, chunk);
  const T* from = side.data + (begin + row) * side.row + (first + column);
  const int tokens = end - begin < C::TOKENS ? static_cast<int>(end - begin) : C::TOKENS;
  if (side.vectors) {
    const int valid = column < count ? tokens - row : 0;
    VK_UNROLL
    for (int i = 0; i < C::TOKENS; i += ROWS, from += ROWS * side.row)
      cp_async16(to + i * PIECE, from, i < valid);
    return;
  }
  VK_NO_UNROLL
  for (int i = 0; i < C::TOKENS; i += ROWS) {
    const int here = row + i < tokens ? count - column : 0;
    load_chunk(to + i * PIECE, here > 0 ? from + i * side.row : side.data, here, false);
  }
}

// sums += left^T right over the tokens of a stage; only `rows` and `columns` (in tiles of 16) exist.
template <class T>
VK_DEVICE void multiply(accumulate_t<T> (&sums)[2][4][4], const T* left, const T* right, int rows,
                        int columns) {
  using C = Config<T>;
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    VK_UNROLL
    for (int k = 0; k < C::TOKENS; k += 16) {
      uint32_t a[2][4];
      VK_UNROLL
      for (int m = 0; m < 2; ++m)
        if (m < rows)
          ldmatrix_x4_trans(a[m], left + C::place(k + (lane & 7) + (lane >> 4) * 8, 2 * m + (lane >> 3 & 1)));
      VK_UNROLL
      for (int n = 0; n < 2; ++n) {
        if (n >= columns) break;
        uint32_t b[4];
        ldmatrix_x4_trans(b, right + C::place(k + (lane & 15), 2 * n + (lane >> 4)));
        VK_UNROLL
        for (int m = 0; m < 2; ++m) {
          if (m >= rows) break;
          mma_m16n8k16<T>(sums[m][2 * n], a[m], {b[0], b[1]});
          mma_m16n8k16<T>(sums[m][2 * n + 1], a[m], {b[2], b[3]});
        }
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
    VK_NO_UNROLL
    for (int k = 0; k < C::TOKENS; ++k) {
      T a[4];
      VK_UNROLL
      for (int r = 0; r < 4; ++r) a[r] = r / 2 < rows ? left[k * PIECE + 8 * r + g] : T(0);
      VK_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (j / 2 >= columns) break;
        const auto b = Vec<T, 2>::load(right + k * PIECE + 8 * j + 2 * t);
        VK_UNROLL
        for (int r = 0; r < 4; ++r) {
          sums[r / 2][j][r % 2 * 2] += a[r] * b[0];
          sums[r / 2][j][r % 2 * 2 + 1] += a[r] * b[1];
        }
      }
    }
  }
}

// dW of the units of a block of threads over a share of the tokens, to partials [parts][nnz][bh][bw] of R.
template <class T, class R>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, sizeof(T) == 8 ? 1 : 2)
    weight_kernel(Problem<T> p, R* result, int64_t result_part) {
  using C = Config<T>;
  const int group = block_x() / p.chunks, first_unit = block_x() % p.chunks * UNITS;
  const int first_row = group * p.group;
  const int end_row = first_row + p.group < p.block_rows ? first_row + p.group : p.block_rows;
  const int units = (p.pointers[end_row] - p.pointers[first_row]) * p.units_of_block.value();
  if (first_unit >= units) return;
  T* stages = reinterpret_cast<T*>(shared_memory());
  int* found = reinterpret_cast<int*>(shared_memory());
  const int first_block = p.units_of_block.divide(first_unit);
  find_blocks(found, p, first_row, end_row, first_block);
  sync_block();

  // Each lane knows unit lane % UNITS. Beyond the last one comes the last one again, which nobody stores.
  const int here = units - first_unit < UNITS ? units - first_unit : UNITS;
  const int mine = lane_id() % UNITS, unit = first_unit + (mine < here ? mine : here - 1);
  const int block = p.units_of_block.divide(unit), inside = unit - block * p.units_of_block.value();
  const int id = found[block - first_block];
  const int left_piece = p.right_pieces.divide(inside);
  const int right_piece = inside - left_piece * p.right_pieces.value();
  const Extent left(p.left, id, left_piece), right(p.right, id, right_piece);
  sync_block();  // `found` has been read

  // Units with the same features share a piece; lane l knows piece l, those on the left first.
  int left_owner = 0, right_owner = 0;
  VK_UNROLL
  for (int other = UNITS - 1; other >= 0; --other) {
    if (shfl(left.first, other) == left.first) left_owner = other;
    if (shfl(right.first, other) == right.first) right_owner = other;
  }
  int left_slot = 0, right_slot = 0, left_count = 0, count = 0, owner = 0;
  VK_UNROLL
  for (int other = 0; other < UNITS; ++other) {
    if (shfl(left_owner, other) != other) continue;
    if (other < left_owner) ++left_slot;
    if (count == lane_id()) owner = other;
    ++count;
  }
  left_count = count;
  right_slot = left_count;
  VK_UNROLL
  for (int other = 0; other < UNITS; ++other) {
    if (shfl(right_owner, other) != other) continue;
    if (other < right_owner) ++right_slot;
    if (count == lane_id()) owner = other;
    ++count;
  }
  const int on_left = shfl(left.first, owner), on_right = shfl(right.first, owner);
  const int left_valid = shfl(left.matrix, owner), right_valid = shfl(right.matrix, owner);
  const int piece_first = lane_id() < left_count ? on_left : on_right;
  const int piece_valid = lane_id() < left_count ? left_valid : right_valid;

  const int64_t begin = block_y() * p.share, end = begin + p.share < p.tokens ? begin + p.share : p.tokens;
  int firsts[OF_LOADER], valid[OF_LOADER];  // of the pieces that this warp loads
  VK_UNROLL
  for (int i = 0; i < OF_LOADER; ++i) {
    firsts[i] = shfl(piece_first, warp_id() + WARPS * i);
    valid[i] = shfl(piece_valid, warp_id() + WARPS * i);
  }
  const auto load = [&](int64_t token, int buffer) {
    VK_UNROLL
    for (int i = 0; i < OF_LOADER; ++i) {
      const int piece = warp_id() + WARPS * i;
      T* to = stages + buffer * C::STAGE + piece * C::ELEMENTS;
      if (piece < left_count) {
        load_piece(to, p.left, firsts[i], valid[i], token, end);
      } else if (piece < count) {
        load_piece(to, p.right, firsts[i], valid[i], token, end);
      }
    }
    cp_async_commit();
  };

  accumulate_t<T> sums[OF_WARP][2][4][4];
  int a[OF_WARP], b[OF_WARP], rows[OF_WARP], columns[OF_WARP];  // where the operands lie, tiles of 16
  VK_UNROLL
  for (int of = 0; of < OF_WARP; ++of) {
    tile_attention::clear(sums[of][0]);
    tile_attention::clear(sums[of][1]);
    const int slot = of * WARPS + warp_id();
    a[of] = shfl(left_slot, slot) * C::ELEMENTS;
    b[of] = shfl(right_slot, slot) * C::ELEMENTS;
    rows[of] = slot < here ? (shfl(left.block, slot) + 15) / 16 : 0;
    columns[of] = (shfl(right.block, slot) + 15) / 16;
  }
  int buffer = 0;
  if (begin < end) load(begin, 0);
  VK_NO_UNROLL
  for (int64_t token = begin; token < end; token += C::TOKENS) {
    cp_async_wait<0>();
    sync_block();  // the stage is there for all, and all are done with the other
    if (token + C::TOKENS < end) load(token + C::TOKENS, 1 - buffer);
    const T* stage = stages + buffer * C::STAGE;
    VK_UNROLL
    for (int of = 0; of < OF_WARP; ++of)
      if (rows[of] > 0) multiply<T>(sums[of], stage + a[of], stage + b[of], rows[of], columns[of]);
    buffer = 1 - buffer;
  }

  const int g = lane_id() / 4, t = lane_id() % 4;
  VK_UNROLL
  for (int of = 0; of < OF_WARP; ++of) {
    const int slot = of * WARPS + warp_id();
    if (slot >= here) break;
    const int block_rows = shfl(left.block, slot), block_columns = shfl(right.block, slot);
    const int matrix_rows = shfl(left.matrix, slot), matrix_columns = shfl(right.matrix, slot);
    const int top = shfl(left_piece, slot) * PIECE, edge = shfl(right_piece, slot) * PIECE;
    const int64_t place = (static_cast<int64_t>(shfl(id, slot)) * p.left.block + top) * p.right.block + edge;
    R* to = result + block_y() * result_part + place;
    VK_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row = 8 * r + g;
      if (row >= block_rows) continue;
      VK_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int column = 8 * j + 2 * t;
        // Exactly 0 beyond the matrix, whatever the sums met there.
        const auto sum = [&](int c) {
          return row < matrix_rows && column + c < matrix_columns ? sums[of][r / 2][j][r % 2 * 2 + c] : 0;
        };
        tile_attention::store_pair<R>(to + static_cast<int64_t>(row) * p.right.block + column, sum(0), sum(1),
                                      block_columns - column);
      }
    }
  }
}

// ---- the launch

int pieces(int block) {
  return static_cast<int>(ceil_div(block, PIECE));
}

template <class T>
Side<T> side(const View& view, const int32_t* index, int features, int block) {
  return {static_cast<const T*>(view.data),
          view.stride[0],
          index,
          features,
          block,
          pieces(block),
          aligned<T>(view) && features % WIDTH<T> == 0 && block % WIDTH<T> == 0};
}

struct Plan {
  int group, chunks, groups;
  int64_t size, bytes;  // of the values; of their sums
  Parts parts;

  explicit Plan(const Params& p)
      : size(p.nnz * p.block_height * p.block_width),
        bytes(size * (p.dtype == DType::f64 ? 8 : 4)),
        parts(p.tokens, most_parts(p), Config<half_t>::TOKENS) {
    const int of_block = pieces(p.block_height) * pieces(p.block_width);
    const int by_pieces = LEFT_PIECES / pieces(p.block_height), by_height = 128 / p.block_height;
    group = by_pieces < by_height ? by_pieces : by_height;
    if (group < 1) group = 1;
    groups = static_cast<int>(ceil_div(p.block_rows, group));
    const int64_t dense = int64_t{1} * group * p.block_cols;
    chunks = static_cast<int>(ceil_div((dense < p.nnz ? dense : p.nnz) * of_block, UNITS));
  }
  // Of those blocks of threads that find work.
  int64_t most_parts(const Params& p) const {
    if (size == 0) return 1;
    const int64_t units = p.nnz * pieces(p.block_height) * pieces(p.block_width);
    const int64_t fit = PARTIAL_BYTES / bytes, fill = MANY_BLOCKS / ceil_div(units, UNITS);
    return fit < fill ? fit : fill;
  }
};

template <class T>
void run(const Params& p, const View& gradient, void* workspace, Stream stream) {
  using Acc = accumulate_t<T>;
  const Plan plan(p);
  const Index index(p.index, p.block_rows, p.block_cols, p.nnz);
  Problem<T> w;
  w.left = side<T>(p.transposed ? p.x : gradient, index.row, p.out_features, p.block_height);
  w.right = side<T>(p.transposed ? gradient : p.x, index.col, p.in_features, p.block_width);
  w.pointers = index.crow;
  w.block_rows = p.block_rows;
  w.group = plan.group;
  w.chunks = plan.chunks;
  w.units_of_block = Divisor(w.left.pieces * w.right.pieces);
  w.right_pieces = Divisor(w.right.pieces);
  w.tokens = p.tokens;
  w.share = plan.parts.share;
  const Dim3 blocks{int64_t{1} * plan.groups * plan.chunks, plan.parts.count};
  T* result = static_cast<T*>(p.grad_values.data);
  if (plan.parts.count == 1) {
    launch(weight_kernel<T, T>, blocks, THREADS, Config<T>::SHARED, stream, w, result, int64_t{0});
    return;
  }
  Acc* partials = static_cast<Acc*>(workspace);
  launch(weight_kernel<T, Acc>, blocks, THREADS, Config<T>::SHARED, stream, w, partials, plan.size);
  reduce<Acc, T>(partials, plan.parts.count, plan.size, result, stream);
}

}  // namespace

// Enough for either way, since which one it is depends on more than sizes.
int64_t weight_gradient_workspace(const Params& p) {
  const Plan plan(p);
  int64_t most = plan.parts.count;
  if (suits_hopper(p)) {
    const int64_t parts = hopper_parts(p, PARTIAL_BYTES).count;
    most = parts > most ? parts : most;
  }
  return most > 1 ? most * plan.bytes : 0;
}

void weight_gradient(const Params& p, const View& gradient, void* workspace, Stream stream) {
  if (p.nnz == 0) return;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (suits_hopper(p)) {
        const Parts parts = hopper_parts(p, PARTIAL_BYTES);
        auto* const partials = static_cast<float*>(workspace);
        if (weight_hopper<T>(p, gradient, parts, partials, stream)) {
          if (parts.count > 1)
            reduce<float, T>(partials, parts.count, p.nnz * p.block_height * p.block_width,
                             static_cast<T*>(p.grad_values.data), stream);
          return;
        }
      }
    }
    run<T>(p, gradient, workspace, stream);
  });
}

}  // namespace vitkernels::block_sparse_linear
