// Backward. First what goes through the activation, and the sum over tokens for the bias with it; then dX,
// the product with the transpose of forward's matrix; then dW at stored blocks.
//
// dW is computed in units of up to 32 x 32 of one stored block, a few consecutive ones a block of threads:
// equal work whatever the rows hold. Neighbours share the columns of dY or x that they have in common. Long
// sums are split over tokens, the parts added in a fixed order; there are no float atomics.
//
// Floor: twice the forward's FLOPs. For dW, eight 32 x 32 blocks of a row take 288 elements a token from L2,
// at 16 bits about 28 FLOPs a byte.
#include "elements.h"
#include "product.h"
#include "vitkernels/divide.h"
#include "vitkernels/tile_attention_engine.h"

namespace vitkernels::block_sparse_linear {
namespace {

using tile_attention::clear;

// Blocks that fill a large GPU about twice, the most memory that partial weight gradients may take, and the
// fewest tokens that are worth a part of their own.
constexpr int64_t MANY_BLOCKS = 512, PARTIAL_BYTES = int64_t{64} << 20, FEWEST_TOKENS = 128;
constexpr int REDUCE_THREADS = 256;

// ---- the activation and the bias

constexpr int COLUMN_WARPS = 8;

template <class T>
struct ColumnProblem {
  const T *grad_y, *kept;     // kept: what went into a GELU, what came out of a ReLU
  T* grad_before;             // null without an activation
  accumulate_t<T>* partials;  // [parts][features], or null
  int64_t tokens, share, grad_row, kept_row;
  int features;
  Activation activation;
  bool vectors;
};

template <class Acc>
VK_DEVICE Acc activation_gradient(Acc gradient, Acc kept, Activation activation) {
  if (activation == Activation::relu) return kept <= Acc(0) ? Acc(0) : gradient;
  const Acc below = Acc(0.5) * (Acc(1) + erf_(kept * Acc(0.70710678118654752440)));
  const Acc density = Acc(0.39894228040143267794) * exp_(Acc(-0.5) * kept * kept);
  return gradient * (below + kept * density);
}

template <class T>
VK_DEVICE Vec<T, WIDTH<T>> read(const T* from, int count, bool vectors) {
  if (vectors) return Vec<T, WIDTH<T>>::load(from);
  Vec<T, WIDTH<T>> values;
  VK_UNROLL
  for (int e = 0; e < WIDTH<T>; ++e) values[e] = e < count ? from[e] : from_float<T>(0.0f);
  return values;
}

// A lane takes 16 bytes of columns, a warp every COLUMN_WARPS-th token of a part.
template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(32 * COLUMN_WARPS, 1) column_kernel(ColumnProblem<T> p) {
  using Acc = accumulate_t<T>;
  constexpr int COLUMNS = 32 * WIDTH<T>;
  const int column = block_x() * COLUMNS + lane_id() * WIDTH<T>, count = p.features - column;
  const int64_t begin = block_y() * p.share, end = begin + p.share < p.tokens ? begin + p.share : p.tokens;
  Acc sums[WIDTH<T>];
  VK_UNROLL
  for (int e = 0; e < WIDTH<T>; ++e) sums[e] = Acc(0);
  if (count > 0) {
    VK_NO_UNROLL
    for (int64_t token = begin + warp_id(); token < end; token += COLUMN_WARPS) {
      auto gradient = read(p.grad_y + token * p.grad_row + column, count, p.vectors);
      if (p.grad_before != nullptr) {
        const auto kept = read(p.kept + token * p.kept_row + column, count, p.vectors);
        T* to = p.grad_before + token * p.features + column;
        VK_UNROLL
        for (int e = 0; e < WIDTH<T>; ++e)
          gradient[e] = from_accumulate<T>(
              activation_gradient(to_accumulate(gradient[e]), to_accumulate(kept[e]), p.activation));
        if (p.vectors) {
          gradient.store(to);
        } else {
          VK_UNROLL
          for (int e = 0; e < WIDTH<T>; ++e)
            if (e < count) to[e] = gradient[e];
        }
      }
      VK_UNROLL
      for (int e = 0; e < WIDTH<T>; ++e) sums[e] += to_accumulate(gradient[e]);
    }
  }
  if (p.partials == nullptr) return;
  Acc* shared = reinterpret_cast<Acc*>(shared_memory());
  VK_UNROLL
  for (int e = 0; e < WIDTH<T>; ++e) shared[warp_id() * COLUMNS + lane_id() * WIDTH<T> + e] = sums[e];
  sync_block();
  VK_NO_UNROLL
  for (int c = thread_x(); c < COLUMNS; c += 32 * COLUMN_WARPS) {
    if (block_x() * COLUMNS + c >= p.features) break;
    Acc sum = Acc(0);
    for (int warp = 0; warp < COLUMN_WARPS; ++warp) sum += shared[warp * COLUMNS + c];
    p.partials[static_cast<int64_t>(block_y()) * p.features + block_x() * COLUMNS + c] = sum;
  }
}

// result[i] = sum over count of partials[count][width], in order.
template <class Acc, class R>
VK_KERNEL void VK_LAUNCH_BOUNDS(REDUCE_THREADS, 1)
    reduce_kernel(const Acc* partials, int64_t count, int64_t width, R* result) {
  const int64_t i = static_cast<int64_t>(block_x()) * REDUCE_THREADS + thread_x();
  if (i >= width) return;
  Acc sum = Acc(0);
  for (int64_t n = 0; n < count; ++n) sum += partials[n * width + i];
  result[i] = from_accumulate<R>(sum);
}

// ---- dW

constexpr int UNITS = 8, WEIGHT_WARPS = 4, WEIGHT_THREADS = 32 * WEIGHT_WARPS;  // of a block of threads
constexpr int PIECE = 32;  // columns of a piece of dY or x, the side of a unit

template <class T>
struct WeightConfig {
  static constexpr int TOKENS = static_cast<int>(64 / sizeof(T));  // of a stage
  static constexpr int CHUNKS = PIECE / WIDTH<T>;
  static constexpr int ELEMENTS = TOKENS * PIECE;  // of a piece: 2 KB
  static constexpr int STAGE = 2 * UNITS * ELEMENTS, STAGES = 2;
  static constexpr size_t SHARED = sizeof(T) * STAGE * STAGES;

  // Where a chunk of a token of a piece lies. At 16 bits rows are 64 bytes: turning the chunks lets ldmatrix
  // find eight rows in eight different banks.
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
struct WeightProblem {
  Side<T> left, right;
  Divisor units_of_block, right_pieces;
  int units;  // in all
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

template <class T>
VK_DEVICE void load_piece(T* piece, const Side<T>& side, int first, int count, int64_t begin, int64_t end) {
  using C = WeightConfig<T>;
  const int chunk = lane_id() % C::CHUNKS, column = chunk * WIDTH<T>;
  if (column >= (side.block + 15) / 16 * 16) return;
  VK_UNROLL
  for (int row = lane_id() / C::CHUNKS; row < C::TOKENS; row += 32 / C::CHUNKS) {
    const int64_t token = begin + row;
    const int here = token < end ? count - column : 0;
    T* to = piece + C::place(row, chunk);
    const T* from = here > 0 ? side.data + token * side.row + first + column : side.data;
    load_chunk(to, from, here, side.vectors);
  }
}

// sums += left^T right over the tokens of a stage; only `rows` and `columns` (in tiles of 16) exist.
template <class T>
VK_DEVICE void multiply(accumulate_t<T> (&sums)[2][4][4], const T* left, const T* right, int rows,
                        int columns) {
  using C = WeightConfig<T>;
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

// dW of UNITS units over a share of the tokens, to partials [parts][nnz][bh][bw] of R.
template <class T, class R>
VK_KERNEL void VK_LAUNCH_BOUNDS(WEIGHT_THREADS, 1)
    weight_kernel(WeightProblem<T> p, R* result, int64_t result_part) {
  using C = WeightConfig<T>;
  constexpr int OF_WARP = UNITS / WEIGHT_WARPS;
  T* stages = reinterpret_cast<T*>(shared_memory());
  const int64_t begin = block_y() * p.share, end = begin + p.share < p.tokens ? begin + p.share : p.tokens;

  // Each lane knows unit lane % UNITS. Beyond the last one comes the last one again, which nobody stores.
  const int wanted = block_x() * UNITS + lane_id() % UNITS, unit = wanted < p.units ? wanted : p.units - 1;
  const int id = p.units_of_block.divide(unit), inside = unit - id * p.units_of_block.value();
  const int left_piece = p.right_pieces.divide(inside);
  const Extent left(p.left, id, left_piece);
  const Extent right(p.right, id, inside - left_piece * p.right_pieces.value());
  // The first unit with the same columns holds them for all.
  int left_owner = 0, right_owner = 0;
  VK_UNROLL
  for (int other = UNITS - 1; other >= 0; --other) {
    if (shfl(left.first, other) == left.first) left_owner = other;
    if (shfl(right.first, other) == right.first) right_owner = other;
  }

  const auto load = [&](int64_t token, int buffer) {
    T* stage = stages + buffer * C::STAGE;
    VK_UNROLL
    for (int of = 0; of < OF_WARP; ++of) {
      const int slot = of * WEIGHT_WARPS + warp_id();
      if (shfl(left_owner, slot) == slot)
        load_piece(stage + slot * C::ELEMENTS, p.left, shfl(left.first, slot), shfl(left.matrix, slot), token,
                   end);
      if (shfl(right_owner, slot) == slot)
        load_piece(stage + (UNITS + slot) * C::ELEMENTS, p.right, shfl(right.first, slot),
                   shfl(right.matrix, slot), token, end);
    }
    cp_async_commit();
  };

  accumulate_t<T> sums[OF_WARP][2][4][4];
  int a[OF_WARP], b[OF_WARP], rows[OF_WARP], columns[OF_WARP];  // where the operands lie, tiles of 16
  VK_UNROLL
  for (int of = 0; of < OF_WARP; ++of) {
    clear(sums[of][0]);
    clear(sums[of][1]);
    const int slot = warp_id() * OF_WARP + of;
    a[of] = shfl(left_owner, slot) * C::ELEMENTS;
    b[of] = (UNITS + shfl(right_owner, slot)) * C::ELEMENTS;
    rows[of] = (shfl(left.block, slot) + 15) / 16;
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
      multiply<T>(sums[of], stage + a[of], stage + b[of], rows[of], columns[of]);
    buffer = 1 - buffer;
  }

  const int g = lane_id() / 4, t = lane_id() % 4;
  VK_UNROLL
  for (int of = 0; of < OF_WARP; ++of) {
    const int slot = warp_id() * OF_WARP + of;
    const int block_rows = shfl(left.block, slot), block_columns = shfl(right.block, slot);
    const int matrix_rows = shfl(left.matrix, slot), matrix_columns = shfl(right.matrix, slot);
    const int block = shfl(id, slot), first_row = shfl(left_piece, slot) * PIECE;
    const int first_column = shfl(inside - left_piece * p.right_pieces.value(), slot) * PIECE;
    if (block_x() * UNITS + slot >= p.units) continue;
    R* to = result + block_y() * result_part +
            (static_cast<int64_t>(block) * p.left.block + first_row) * p.right.block + first_column;
    VK_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row = 8 * r + g;
      if (row >= block_rows) continue;
      VK_UNROLL
      for (int j = 0; j < 4; ++j) {
        VK_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int column = 8 * j + 2 * t + c;
          if (column >= block_columns) continue;
          // Exactly 0 beyond the matrix, whatever the sums met there.
          const bool exists = row < matrix_rows && column < matrix_columns;
          to[static_cast<int64_t>(row) * p.right.block + column] =
              exists ? from_accumulate<R>(sums[of][r / 2][j][r % 2 * 2 + c]) : from_accumulate<R>(0);
        }
      }
    }
  }
}

// ---- what is launched, and where everything lies in the workspace

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int pieces(int block) {
  return static_cast<int>(ceil_div(block, PIECE));
}

struct Plan {
  int64_t column_blocks, column_share, column_parts;
  int64_t units, weight_blocks, weight_share, weight_parts = 1;
  int64_t bias = 0, weight = 0, size = 0;  // bytes

  explicit Plan(const Params& p) {
    const int64_t wide = p.dtype == DType::f64 ? 8 : 4;
    const int64_t width = p.dtype == DType::f64 ? 2 : p.dtype == DType::f32 ? 4 : 8;
    column_blocks = ceil_div(p.given(), 32 * width);
    split(p.tokens, MANY_BLOCKS / column_blocks, COLUMN_WARPS, &column_share, &column_parts);
    if (p.grad_bias) bias = take(column_parts * p.given() * wide);

    units = p.nnz * pieces(p.block_height) * pieces(p.block_width);
    weight_blocks = ceil_div(units, UNITS);
    if (!p.grad_values || units == 0) return;
    const int64_t bytes = p.nnz * p.block_height * p.block_width * wide;
    const int64_t fit = PARTIAL_BYTES / bytes, fill = MANY_BLOCKS / weight_blocks;
    split(p.tokens, fit < fill ? fit : fill, 32, &weight_share, &weight_parts);
    if (weight_parts > 1) weight = take(weight_parts * bytes);
  }

  // At most `most` equal parts of the tokens, each a multiple of `multiple` and worth its while.
  static void split(int64_t tokens, int64_t most, int64_t multiple, int64_t* share, int64_t* parts) {
    if (most < 1) most = 1;
    *share = ceil_div(tokens, most);
    if (*share < FEWEST_TOKENS) *share = FEWEST_TOKENS;
    *share = ceil_div(*share, multiple) * multiple;
    *parts = tokens == 0 ? 1 : ceil_div(tokens, *share);
  }
  int64_t take(int64_t bytes) {
    const int64_t place = size;
    size += ceil_div(bytes, 256) * 256;
    return place;
  }
};

template <class Acc>
Acc* workspace(const Params& p, int64_t place) {
  return reinterpret_cast<Acc*>(static_cast<char*>(p.workspace) + place);
}

template <class Acc, class R>
void reduce(const Acc* partials, int64_t count, int64_t width, void* result, Stream stream) {
  launch(reduce_kernel<Acc, R>, Dim3{ceil_div(width, REDUCE_THREADS)}, REDUCE_THREADS, 0, stream, partials,
         count, width, static_cast<R*>(result));
}

template <class T>
void columns(const Params& p, const Plan& plan, Stream stream) {
  using Acc = accumulate_t<T>;
  const View& kept = p.activation == Activation::relu ? p.y : p.before;
  ColumnProblem<T> c;
  c.grad_y = static_cast<const T*>(p.grad_y.data);
  c.kept = static_cast<const T*>(kept.data);
  c.grad_before = static_cast<T*>(p.grad_before.data);
  c.partials = p.grad_bias ? workspace<Acc>(p, plan.bias) : nullptr;
  c.tokens = p.tokens;
  c.share = plan.column_share;
  c.grad_row = p.grad_y.stride[0];
  c.kept_row = kept.stride[0];
  c.features = p.given();
  c.activation = p.activation;
  c.vectors = c.features % WIDTH<T> == 0 && aligned<T>(p.grad_y) &&
              (!p.grad_before || (aligned<T>(kept) && aligned<T>(p.grad_before)));
  launch(column_kernel<T>, Dim3{plan.column_blocks, plan.column_parts}, 32 * COLUMN_WARPS,
         sizeof(Acc) * COLUMN_WARPS * 32 * WIDTH<T>, stream, c);
  if (c.partials != nullptr)
    reduce<Acc, T>(c.partials, plan.column_parts, c.features, p.grad_bias.data, stream);
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

template <class T>
void weights(const Params& p, const Plan& plan, const View& gradient, Stream stream) {
  using Acc = accumulate_t<T>;
  const Index index(p.index, p.block_rows, p.block_cols, p.nnz);
  WeightProblem<T> w;
  w.left = side<T>(p.transposed ? p.x : gradient, index.row, p.out_features, p.block_height);
  w.right = side<T>(p.transposed ? gradient : p.x, index.col, p.in_features, p.block_width);
  w.units_of_block = Divisor(w.left.pieces * w.right.pieces);
  w.right_pieces = Divisor(w.right.pieces);
  w.units = static_cast<int>(plan.units);
  w.tokens = p.tokens;
  w.share = plan.weight_share;
  const Dim3 blocks{plan.weight_blocks, plan.weight_parts};
  const int64_t size = p.nnz * p.block_height * p.block_width;
  if (plan.weight_parts == 1) {
    launch(weight_kernel<T, T>, blocks, WEIGHT_THREADS, WeightConfig<T>::SHARED, stream, w,
           static_cast<T*>(p.grad_values.data), int64_t{0});
    return;
  }
  Acc* partials = workspace<Acc>(p, plan.weight);
  launch(weight_kernel<T, Acc>, blocks, WEIGHT_THREADS, WeightConfig<T>::SHARED, stream, w, partials, size);
  reduce<Acc, T>(partials, plan.weight_parts, size, p.grad_values.data, stream);
}

}  // namespace

int64_t backward_workspace_cuda(const Params& p) {
  return Plan(p).size;
}

void backward_cuda(const Params& p, Stream stream) {
  const Plan plan(p);
  if (p.grad_bias || p.grad_before)
    tile_attention::with_dtype(p.dtype, [&](auto zero) { columns<decltype(zero)>(p, plan, stream); });
  const View& gradient = p.grad_before ? p.grad_before : p.grad_y;
  if (p.grad_x) product(p, {!p.transposed, Activation::none, gradient, {}, {}, p.grad_x}, stream);
  if (p.grad_values && plan.units > 0)
    tile_attention::with_dtype(p.dtype,
                               [&](auto zero) { weights<decltype(zero)>(p, plan, gradient, stream); });
}

}  // namespace vitkernels::block_sparse_linear
