// Forward of the residual FFN.
//
// Floor of N tokens of C channels and H hidden units: 2 N C sizeof(T) bytes (x in, out out), 2 C H sizeof(T)
// of weights, and 4 N C H + 18 N C FLOPs. At EfficientViT's sizes (C = 64 to 384, H = 2 C) a single image is
// bound by latency and by how fast few SMs can fetch 33 KB to 1.2 MB of weights, many images by the tensor
// cores: C = 192 and 14 x 14 are 190 FLOPs a byte.
//   fused     A block takes a tile of tokens through both products, with u and the hidden layer in shared
//             memory; every weight passes through it once.
//   split     Two launches with the hidden layer, and u, in a workspace between them, for so few tokens that
//             the tiles would leave most of the device idle: a block has 16 tokens and some rows of the
//             weight, and its warps share the depth of the product.
// The second launch fetches its weights while the first one runs.
// x is read with its neighbours where it lies; the nine reads of an element meet in the first-level cache.
#include "tensor.h"

namespace vitkernels::residual_ffn {
namespace {

using tile_attention::Carver;
using tile_attention::Product;
using tile_attention::ProductTile;
using tile_attention::TensorCores;
using tile_attention::Weights;

constexpr int WARPS = THREADS / 32;

// What becomes of a pair of sums of the first product, of columns n + offset and the next.
template <class T>
struct StoreHidden {
  const float *scale, *bias;
  T* hidden;
  int ld;

  VK_DEVICE void operator()(int row, int n, int offset, float left, float right) const {
    const int column = n + offset;
    const auto factor = Vec<float, 2>::load(scale + column), shift = Vec<float, 2>::load(bias + column);
    Vec<T, 2>{
        {from_float<T>(relu(left * factor[0] + shift[0])), from_float<T>(relu(right * factor[1] + shift[1]))}}
        .store(hidden + row * ld + column);
  }
};

// And of the second: u becomes the result in place, since nobody else has these two.
template <class T>
struct AddToInputs {
  const float *scale, *bias;
  T* u;
  int ld;

  VK_DEVICE void operator()(int row, int n, int offset, float left, float right) const {
    const int column = n + offset;
    const auto factor = Vec<float, 2>::load(scale + column), shift = Vec<float, 2>::load(bias + column);
    const auto before = Vec<T, 2>::load(u + row * ld + column);
    Vec<T, 2>{{from_float<T>(to_float(before[0]) + (left * factor[0] + shift[0])),
               from_float<T>(to_float(before[1]) + (right * factor[1] + shift[1]))}}
        .store(u + row * ld + column);
  }
};

// How a call of either launch of `tiles` is cut: tokens, rows of the weight, and the depth that is staged.
struct Tiles {
  int row_bits = 0, columns = 0, depth = 0;
  double time = 0;  // in nanoseconds, by the model below; 0: none fits
};

// ---- fused

struct FusedLayout {
  int row_bits;
  int ld_u, ld_hidden;
  int u, hidden;
  int vectors;  // scale1, bias1, scale2, bias2
  int taps;     // where the hidden layer comes to lie
  ProductTile tile;
  int64_t bytes;

  FusedLayout(const Params& p, int row_bits, int depth) : row_bits(row_bits) {
    const int rows = 1 << row_bits;
    tile = ProductTile::choose(rows, THREADS / 32, p.hidden > p.channels ? p.hidden : p.channels, depth);
    ld_u = leading_dimension<half_t>(p.channels);
    ld_hidden = leading_dimension<half_t>(p.hidden);
    const int hidden_bytes = rows * ld_hidden * 2, taps_bytes = 4 * taps_elements(p);
    Carver carver;
    u = carver.take<half_t>(rows * ld_u);
    hidden = taps = carver.take<char>(hidden_bytes > taps_bytes ? hidden_bytes : taps_bytes);
    vectors = carver.take<float>(2 * (p.hidden + p.channels));
    tile.buffers = carver.take<half_t>(2 * tile.elements);
    bytes = carver.used();
  }
};

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 2) forward_fused_kernel(Problem problem, FusedLayout layout) {
  const Params& p = problem.params;
  char* shared = shared_memory();
  T *u = reinterpret_cast<T*>(shared + layout.u), *hidden = reinterpret_cast<T*>(shared + layout.hidden);
  auto *scale1 = reinterpret_cast<float*>(shared + layout.vectors), *bias1 = scale1 + p.hidden,
       *scale2 = bias1 + p.hidden, *bias2 = scale2 + p.channels;
  auto* taps = reinterpret_cast<float*>(shared + layout.taps);
  Product<T> product(layout.tile, shared);
  const int rows = 1 << layout.row_bits;
  const int64_t first = static_cast<int64_t>(block_x()) << layout.row_bits;

  stage_taps<T>(taps, problem);
  stage_vector<T>(scale1, problem, p.scale1, 0, p.hidden);
  stage_vector<T>(bias1, problem, p.bias1, 0, p.hidden);
  stage_vector<T>(scale2, problem, p.scale2, 0, p.channels);
  stage_vector<T>(bias2, problem, p.bias2, 0, p.channels);
  cp_async_commit();
  const Weights weight1{p.weight1.data, p.weight1.stride[0], p.weight1.stride[1], p.hidden, p.channels};
  const Weights weight2{p.weight2.data, p.weight2.stride[0], p.weight2.stride[1], p.channels, p.hidden};
  product.template start<true>(weight1);
  make_inputs<T>(u, layout.ld_u, problem, first, layout.row_bits, taps, [] {
    cp_async_wait<1>();
    sync_block();
  });

  product.template run<true>(u, layout.ld_u, rows, weight1,
                             StoreHidden<T>{scale1, bias1, hidden, layout.ld_hidden}, [](int, int) {});
  product.template start<true>(weight2);
  product.template run<true>(hidden, layout.ld_hidden, rows, weight2,
                             AddToInputs<T>{scale2, bias2, u, layout.ld_u}, [](int, int) {});
  sync_block();

  store_outputs(u, layout.ld_u, problem, first, layout.row_bits, 0, p.channels);
}

// The workspace: the hidden layer [tokens][hidden], then u [tokens][channels].
template <class T>
VK_DEVICE T* workspace_u(const Problem& problem) {
  return static_cast<T*>(problem.params.workspace) + problem.tokens * problem.params.hidden;
}

// ---- tiles

// Of either launch: 2^row_bits tokens and `columns` rows of the weight.
struct TilesLayout {
  int row_bits, columns;
  int ld_left, ld_result;
  int left, result;
  int taps;     // where the result comes to lie
  int vectors;  // scale, bias
  ProductTile tile;
  int64_t bytes;

  TilesLayout(const Tiles& tiles, int depth_of_product, int taps_count)
      : row_bits(tiles.row_bits), columns(tiles.columns) {
    const int rows = 1 << row_bits;
    tile = ProductTile::choose(rows, THREADS / 32, columns, tiles.depth);
    ld_left = leading_dimension<half_t>(depth_of_product);
    ld_result = leading_dimension<half_t>(columns);
    const int result_bytes = rows * ld_result * 2, taps_bytes = 4 * taps_count;
    Carver carver;
    left = carver.take<half_t>(rows * ld_left);
    result = taps = carver.take<char>(result_bytes > taps_bytes ? result_bytes : taps_bytes);
    vectors = carver.take<float>(2 * columns);
    tile.buffers = carver.take<half_t>(2 * tile.elements);
    bytes = carver.used();
  }
};

// `rows` rows of a dense matrix with `width` columns from row `first` and column `column` on: `count` of
// them, a multiple of 8, to or from a tile. Rows beyond the last token are zeros, or skipped.
template <class T>
VK_DEVICE void load_dense(T* tile, int ld, const Problem& problem, const T* matrix, int64_t first, int width,
                          int column, int count, int rows) {
  VK_NO_UNROLL
  for (int row = warp_id(); row < rows; row += WARPS) {
    const bool valid = first + row < problem.tokens;
    const T* source = matrix + (valid ? (first + row) * width + column : 0);
    VK_NO_UNROLL
    for (int k = 8 * lane_id(); k < count; k += 8 * 32) cp_async16(tile + row * ld + k, source + k, valid);
  }
}
template <class T>
VK_DEVICE void store_dense(T* matrix, const Problem& problem, const T* tile, int ld, int64_t first, int width,
                           int column, int count, int rows) {
  VK_NO_UNROLL
  for (int row = warp_id(); row < rows && first + row < problem.tokens; row += WARPS) {
    T* target = matrix + (first + row) * width + column;
    VK_NO_UNROLL
    for (int k = 8 * lane_id(); k < count; k += 8 * 32)
      Vec<T, 8>::load(tile + row * ld + k).store(target + k);
  }
}

// Some rows of a weight.
template <class T>
VK_DEVICE Weights rows_of(const View& weight, int first, int rows, int columns) {
  return {static_cast<const T*>(weight.data) + first * weight.stride[0], weight.stride[0], weight.stride[1],
          rows, columns};
}

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 2) forward_expand_tiles_kernel(Problem problem, TilesLayout layout) {
  const Params& p = problem.params;
  char* shared = shared_memory();
  T *u = reinterpret_cast<T*>(shared + layout.left), *result = reinterpret_cast<T*>(shared + layout.result);
  auto *scale1 = reinterpret_cast<float*>(shared + layout.vectors), *bias1 = scale1 + layout.columns,
       *taps = reinterpret_cast<float*>(shared + layout.taps);
  Product<T> product(layout.tile, shared);
  const int rows = 1 << layout.row_bits, first_column = block_y() * layout.columns;
  const int columns = p.hidden - first_column < layout.columns ? p.hidden - first_column : layout.columns;
  const int64_t first = static_cast<int64_t>(block_x()) << layout.row_bits;

  admit_launch();
  stage_taps<T>(taps, problem);
  stage_vector<T>(scale1, problem, p.scale1, first_column, columns);
  stage_vector<T>(bias1, problem, p.bias1, first_column, columns);
  cp_async_commit();
  const Weights weight1 = rows_of<T>(p.weight1, first_column, columns, p.channels);
  product.template start<true>(weight1);
  make_inputs<T>(u, layout.ld_left, problem, first, layout.row_bits, taps, [] {
    cp_async_wait<1>();
    sync_block();
  });
  product.template run<true>(u, layout.ld_left, rows, weight1,
                             StoreHidden<T>{scale1, bias1, result, layout.ld_result}, [](int, int) {});
  // The blocks of the same tokens share the copying of u, by channels.
  const int blocks = (p.hidden + layout.columns - 1) / layout.columns, chunks = p.channels / 8;
  const int begin = block_y() * chunks / blocks * 8, end = (block_y() + 1) * chunks / blocks * 8;
  store_dense(workspace_u<T>(problem), problem, u + begin, layout.ld_left, first, p.channels, begin,
              end - begin, rows);
  sync_block();
  store_dense(static_cast<T*>(p.workspace), problem, result, layout.ld_result, first, p.hidden, first_column,
              columns, rows);
}

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 2)
    forward_contract_tiles_kernel(Problem problem, TilesLayout layout) {
  const Params& p = problem.params;
  char* shared = shared_memory();
  T *hidden = reinterpret_cast<T*>(shared + layout.left),
    *result = reinterpret_cast<T*>(shared + layout.result);
  auto *scale2 = reinterpret_cast<float*>(shared + layout.vectors), *bias2 = scale2 + layout.columns;
  Product<T> product(layout.tile, shared);
  const int rows = 1 << layout.row_bits, first_column = block_y() * layout.columns;
  const int columns = p.channels - first_column < layout.columns ? p.channels - first_column : layout.columns;
  const int64_t first = static_cast<int64_t>(block_x()) << layout.row_bits;

  stage_vector<T>(scale2, problem, p.scale2, first_column, columns);
  stage_vector<T>(bias2, problem, p.bias2, first_column, columns);
  const Weights weight2 = rows_of<T>(p.weight2, first_column, columns, p.hidden);
  product.template start<true>(weight2);
  wait_for_launch();
  load_dense(hidden, layout.ld_left, problem, static_cast<const T*>(p.workspace), first, p.hidden, 0,
             p.hidden, rows);
  load_dense(result, layout.ld_result, problem, workspace_u<T>(problem), first, p.channels, first_column,
             columns, rows);
  cp_async_commit();
  product.template run<true>(hidden, layout.ld_left, rows, weight2,
                             AddToInputs<T>{scale2, bias2, result, layout.ld_result}, [](int, int) {});
  sync_block();
  store_outputs(result, layout.ld_result, problem, first, layout.row_bits, first_column, columns);
}

// ---- split

constexpr int SPLIT_BITS = 4, SPLIT_ROWS = 1 << SPLIT_BITS;

// Shared memory of either launch: 16 rows of the left operand, COLUMNS of the weight, and every warp's part
// of the sums.
struct SplitLayout {
  int ld, ld_parts;
  int left, weight, parts, taps;
  int64_t bytes;

  // A row of parts is 8 words longer for threads that read along it, 4 for threads that read down a column:
  // those that store it lie between.
  SplitLayout(int columns, int depth, int taps_count, bool along_rows = true)
      : ld(leading_dimension<half_t>(depth)), ld_parts(columns + (along_rows ? 8 : 4)) {
    Carver carver;
    left = carver.take<half_t>(SPLIT_ROWS * ld);
    weight = carver.take<half_t>(columns * ld);
    parts = carver.take<float>(WARPS * SPLIT_ROWS * ld_parts);
    taps = carver.take<float>(taps_count);
    bytes = carver.used();
  }
};

// Rows `first` to first + columns of a weight, zeros beyond the last. A warp copies a row.
template <class T>
VK_DEVICE void stage_weight(T* target, int ld, const View& weight, int first, int rows, int columns,
                            int depth) {
  const auto* data = static_cast<const T*>(weight.data);
  const bool vectorized = weight.stride[1] == 1 && weight.stride[0] % 8 == 0 &&
                          reinterpret_cast<uintptr_t>(data) % (8 * sizeof(T)) == 0;
  VK_NO_UNROLL
  for (int row = warp_id(); row < columns; row += WARPS) {
    const bool valid = first + row < rows;
    const T* source = data + (valid ? (first + row) * weight.stride[0] : 0);
    VK_NO_UNROLL
    for (int k = 8 * lane_id(); k < depth; k += 8 * 32) {
      if (vectorized) {
        cp_async16(target + row * ld + k, source + k, valid);
        continue;
      }
      auto values = zeros<T>();
      if (valid) {
        VK_UNROLL
        for (int e = 0; e < 8; ++e) values[e] = source[(k + e) * weight.stride[1]];
      }
      values.store(target + row * ld + k);
    }
  }
}

// 16 rows by COLUMNS, each warp's over a part of the depth, to its part of `parts`. The caller's barrier
// comes before the parts are read.
template <class T, int COLUMNS>
VK_DEVICE void multiply_split(float* parts, int ld_parts, const T* left, const T* weight, int ld, int depth) {
  using Engine = TensorCores<T, 16>;
  const int steps = depth / 16, warp = warp_id();
  const int begin = 16 * (warp * steps / WARPS), end = 16 * ((warp + 1) * steps / WARPS);
  float sums[COLUMNS / 8][4];
  tile_attention::clear(sums);
  Engine::multiply_rows(sums, left + begin, ld, weight + begin, ld, end - begin, {0, COLUMNS});
  float* target = parts + (warp * SPLIT_ROWS + lane_id() / 4) * ld_parts + lane_id() % 4 * 2;
  VK_UNROLL
  for (int j = 0; j < COLUMNS / 8; ++j) {
    Vec<float, 2>{{sums[j][0], sums[j][1]}}.store(target + 8 * j);
    Vec<float, 2>{{sums[j][2], sums[j][3]}}.store(target + 8 * ld_parts + 8 * j);
  }
}

// The two neighbours of a row from `column` on, in the order of the depth.
VK_DEVICE Vec<float, 2> add_parts(const float* parts, int ld_parts, int row, int column) {
  Vec<float, 2> sum{{0.0f, 0.0f}};
  VK_UNROLL
  for (int warp = 0; warp < WARPS; ++warp) {
    const auto part = Vec<float, 2>::load(parts + (warp * SPLIT_ROWS + row) * ld_parts + column);
    sum[0] += part[0];
    sum[1] += part[1];
  }
  return sum;
}

template <class T, int COLUMNS>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 2) forward_expand_kernel(Problem problem, SplitLayout layout) {
  const Params& p = problem.params;
  char* shared = shared_memory();
  T *u = reinterpret_cast<T*>(shared + layout.left), *weight = reinterpret_cast<T*>(shared + layout.weight);
  auto *parts = reinterpret_cast<float*>(shared + layout.parts),
       *taps = reinterpret_cast<float*>(shared + layout.taps);
  const int64_t first = static_cast<int64_t>(block_x()) << SPLIT_BITS;
  const int first_column = block_y() * COLUMNS;

  admit_launch();
  stage_taps<T>(taps, problem);
  cp_async_commit();
  stage_weight<T>(weight, layout.ld, p.weight1, first_column, p.hidden, COLUMNS, p.channels);
  cp_async_commit();
  make_inputs<T>(u, layout.ld, problem, first, SPLIT_BITS, taps, [] {
    cp_async_wait<1>();
    sync_block();
  });
  // A thread has the same two columns in all of its rows.
  const int column = thread_x() % (COLUMNS / 2) * 2, hidden_column = first_column + column;
  const bool wanted = hidden_column < p.hidden;
  float scale[2] = {}, bias[2] = {};
  if (wanted) {
    VK_UNROLL
    for (int c = 0; c < 2; ++c) {
      scale[c] = element<T>(problem, p.scale1, hidden_column + c);
      bias[c] = element<T>(problem, p.bias1, hidden_column + c);
    }
  }
  cp_async_wait<0>();
  sync_block();
  multiply_split<T, COLUMNS>(parts, layout.ld_parts, u, weight, layout.ld, p.channels);

  // The blocks of the same tokens share the copying of u.
  const int chunks = p.channels / 8, blocks = (p.hidden + COLUMNS - 1) / COLUMNS;
  T* const kept = workspace_u<T>(problem);
  for (int i = block_y() * THREADS + thread_x(); i < SPLIT_ROWS * chunks; i += blocks * THREADS) {
    const int row = i / chunks, chunk = i % chunks;
    if (first + row < problem.tokens)
      Vec<T, 8>::load(u + row * layout.ld + 8 * chunk).store(kept + (first + row) * p.channels + 8 * chunk);
  }
  sync_block();
  if (!wanted) return;
  auto* const hidden = static_cast<T*>(p.workspace);
  VK_UNROLL
  for (int row = thread_x() / (COLUMNS / 2); row < SPLIT_ROWS; row += THREADS / (COLUMNS / 2)) {
    if (first + row >= problem.tokens) break;
    const auto sum = add_parts(parts, layout.ld_parts, row, column);
    Vec<T, 2>{
        {from_float<T>(relu(sum[0] * scale[0] + bias[0])), from_float<T>(relu(sum[1] * scale[1] + bias[1]))}}
        .store(hidden + (first + row) * p.hidden + hidden_column);
  }
}

template <class T, int COLUMNS>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 2) forward_contract_kernel(Problem problem, SplitLayout layout) {
  const Params& p = problem.params;
  char* shared = shared_memory();
  T *left = reinterpret_cast<T*>(shared + layout.left),
    *weight = reinterpret_cast<T*>(shared + layout.weight);
  auto* parts = reinterpret_cast<float*>(shared + layout.parts);
  const int64_t first = static_cast<int64_t>(block_x()) << SPLIT_BITS;
  const int first_column = block_y() * COLUMNS;

  stage_weight<T>(weight, layout.ld, p.weight2, first_column, p.channels, COLUMNS, p.hidden);
  wait_for_launch();
  const auto* hidden = static_cast<const T*>(p.workspace);
  VK_NO_UNROLL
  for (int row = warp_id(); row < SPLIT_ROWS; row += WARPS) {
    const bool valid = first + row < problem.tokens;
    const T* source = hidden + (valid ? (first + row) * p.hidden : 0);
    VK_NO_UNROLL
    for (int k = 8 * lane_id(); k < p.hidden; k += 8 * 32)
      cp_async16(left + row * layout.ld + k, source + k, valid);
  }
  cp_async_commit();

  // Neighbouring threads have neighbouring columns, or tokens, as these are dense in memory.
  constexpr int PAIRS = COLUMNS / 2, VISITS = SPLIT_ROWS * PAIRS / THREADS;
  static_assert(VISITS * THREADS == SPLIT_ROWS * PAIRS);
  const bool channels_dense = p.out.stride[1] == 1;
  const auto row_of = [&](int i) { return channels_dense ? i / PAIRS : i % SPLIT_ROWS; };
  const auto column_of = [&](int i) { return 2 * (channels_dense ? i % PAIRS : i / SPLIT_ROWS); };
  const T* kept = workspace_u<T>(problem);
  Vec<T, 2> residual[VISITS];
  float scale[VISITS][2], bias[VISITS][2];
  int64_t target[VISITS];
  bool wanted[VISITS];
  VK_UNROLL
  for (int visit = 0; visit < VISITS; ++visit) {
    const int i = visit * THREADS + thread_x(), column = first_column + column_of(i);
    wanted[visit] = first + row_of(i) < problem.tokens && column < p.channels;
    if (!wanted[visit]) continue;
    residual[visit] = Vec<T, 2>::load(kept + (first + row_of(i)) * p.channels + column);
    target[visit] = Place(problem, first, row_of(i)).offset(p.out) + column * p.out.stride[1];
    VK_UNROLL
    for (int c = 0; c < 2; ++c) {
      scale[visit][c] = element<T>(problem, p.scale2, column + c);
      bias[visit][c] = element<T>(problem, p.bias2, column + c);
    }
  }
  cp_async_wait<0>();
  sync_block();
  multiply_split<T, COLUMNS>(parts, layout.ld_parts, left, weight, layout.ld, p.hidden);
  sync_block();
  auto* const out = static_cast<T*>(p.out.data);
  VK_UNROLL
  for (int visit = 0; visit < VISITS; ++visit) {
    if (!wanted[visit]) continue;
    const int i = visit * THREADS + thread_x();
    const auto sum = add_parts(parts, layout.ld_parts, row_of(i), column_of(i));
    Vec<T, 2> result;
    VK_UNROLL
    for (int c = 0; c < 2; ++c)
      result[c] = from_float<T>(to_float(residual[visit][c]) + (sum[c] * scale[visit][c] + bias[visit][c]));
    out[target[visit]] = result[0];
    out[target[visit] + p.out.stride[1]] = result[1];
  }
}

// ---- the choice

constexpr int SMS = 132;  // of the large devices that the tiles are chosen for

enum class Kind { PLAIN, FUSED, TILES, SPLIT };

struct Way {
  Kind kind = Kind::PLAIN;
  Tiles first, second;             // the launches of tiles; `first` of fused
  int columns1 = 0, columns2 = 0;  // of split
  double time = 0;
};

// A model of an H200 that need only order the ways of computing. Nanoseconds, FLOPs and bytes of an SM.
constexpr double LAUNCH_NS = 2000;  // with the latencies of a block
constexpr double PRODUCT_FLOPS_NS = 4300, FETCH_BYTES_NS = 80;
constexpr double INPUT_NS = 0.15;  // an element of u
constexpr double OVERLAP = 0.75;   // of two blocks on an SM: one computes u or waits while one multiplies
constexpr double L2_BYTES_NS = 4000;

// `blocks` of which each makes some elements of u, multiplies with so many of its eight warps and fetches
// weights.
double launch_time(int64_t blocks, int64_t bytes, double inputs, double flops, double warps, double fetched) {
  const int64_t fit = 228 * 1024 / (bytes + 1024) >= 2 ? 2 : 1;  // on an SM
  const int64_t together = blocks <= SMS ? 1 : fit, waves = (blocks + SMS * together - 1) / (SMS * together);
  const double share = warps * together < WARPS ? warps * together / WARPS : 1;
  const double multiplying = flops / (PRODUCT_FLOPS_NS * share), fetching = fetched / FETCH_BYTES_NS;
  const double block = inputs * INPUT_NS + (multiplying > fetching ? multiplying : fetching);
  return LAUNCH_NS + waves * (together == 1 ? block : together * OVERLAP * block);
}

int64_t tiles_of(const Problem& problem, int row_bits) {
  return (problem.tokens + (int64_t{1} << row_bits) - 1) >> row_bits;
}

void keep_fused(Tiles* best, const Problem& problem, int row_bits, int depth, int64_t limit) {
  const Params& p = problem.params;
  const int64_t bytes = FusedLayout(p, row_bits, depth).bytes;
  if (bytes > limit) return;
  const int rows = 1 << row_bits;
  const double weights = 2.0 * p.channels * p.hidden;
  const double time = launch_time(tiles_of(problem, row_bits), bytes, p.dw_weight ? rows * p.channels : 0,
                                  2 * weights * (rows < 32 ? 32 : rows), WARPS, 2 * weights);
  if (best->time == 0 || time < best->time) *best = {row_bits, 0, depth, time};
}

// The cheapest launch of tiles for a product of `outputs` columns and some depth.
Tiles choose_tiles(const Problem& problem, int outputs, int depth_of_product, bool expands, int64_t limit) {
  const Params& p = problem.params;
  Tiles best;
  for (int row_bits = 5; row_bits <= 6; ++row_bits) {
    for (int columns = 64; columns / 2 < outputs && columns <= 256; columns *= 2) {
      for (int depth = 64; depth >= 32; depth /= 2) {
        Tiles tiles{row_bits, columns, depth, 0};
        const int64_t bytes = TilesLayout(tiles, depth_of_product, expands ? taps_elements(p) : 0).bytes;
        if (bytes > limit) continue;
        const int rows = 1 << row_bits, most = columns < outputs ? columns : outputs;
        const double warps = (most + 31) / 32 * rows / 32;
        const int64_t blocks = tiles_of(problem, row_bits) * ((outputs + columns - 1) / columns);
        tiles.time = launch_time(blocks, bytes, expands && p.dw_weight ? rows * p.channels : 0,
                                 2.0 * rows * most * depth_of_product, warps < WARPS ? warps : WARPS,
                                 2.0 * depth_of_product * (most + (expands ? 0 : rows)));
        if (best.time == 0 || tiles.time < best.time) best = tiles;
      }
    }
  }
  return best;
}

// The widest for which the launch fills the device.
int split_columns(const Problem& problem, int columns) {
  return tiles_of(problem, SPLIT_BITS) * ((columns + 63) / 64) >= 64 ? 64 : 32;
}

Way choose_way(const Problem& problem) {
  const Params& p = problem.params;
  Way best;
  if (sizeof_dtype(p.dtype) != 2 || p.channels % 16 != 0 || p.hidden % 16 != 0) return best;
  const auto limit = static_cast<int64_t>(shared_limit());
  const auto consider = [&](const Way& way) {
    if (best.kind == Kind::PLAIN || way.time < best.time) best = way;
  };
  Tiles fused;
  for (int row_bits = 4; row_bits <= 6; ++row_bits)
    for (int depth = 64; depth >= 32; depth /= 2) keep_fused(&fused, problem, row_bits, depth, limit);
  if (fused.time > 0) consider({Kind::FUSED, fused, {}, 0, 0, fused.time});
  const Tiles expand = choose_tiles(problem, p.hidden, p.channels, true, limit),
              contract = choose_tiles(problem, p.channels, p.hidden, false, limit);
  if (expand.time > 0 && contract.time > 0)
    consider({Kind::TILES, expand, contract, 0, 0, expand.time + contract.time});
  const int columns1 = split_columns(problem, p.hidden), columns2 = split_columns(problem, p.channels);
  if (SplitLayout(columns1, p.channels, taps_elements(p)).bytes <= limit &&
      SplitLayout(columns2, p.hidden, 0).bytes <= limit) {
    const double weights = 4.0 * p.channels * p.hidden;
    const double time = 2 * LAUNCH_NS + tiles_of(problem, SPLIT_BITS) * weights / L2_BYTES_NS;
    consider({Kind::SPLIT, {}, {}, columns1, columns2, time});
  }
  return best;
}

template <class T>
void launch_tiles(const Problem& problem, const Way& way, Stream stream) {
  const Params& p = problem.params;
  const TilesLayout first(way.first, p.channels, taps_elements(p)), second(way.second, p.hidden, 0);
  const Dim3 grid1{tiles_of(problem, first.row_bits), (p.hidden + first.columns - 1) / first.columns};
  const Dim3 grid2{tiles_of(problem, second.row_bits), (p.channels + second.columns - 1) / second.columns};
  launch(forward_expand_tiles_kernel<T>, grid1, THREADS, static_cast<size_t>(first.bytes), stream, problem,
         first);
  launch_dependent(forward_contract_tiles_kernel<T>, grid2, THREADS, static_cast<size_t>(second.bytes),
                   stream, problem, second);
}

template <class T>
void launch_split(const Problem& problem, const Way& way, Stream stream) {
  const Params& p = problem.params;
  const int64_t tiles = tiles_of(problem, SPLIT_BITS);
  const SplitLayout first(way.columns1, p.channels, taps_elements(p)),
      second(way.columns2, p.hidden, 0, p.out.stride[1] == 1);
  const Dim3 grid1{tiles, (p.hidden + way.columns1 - 1) / way.columns1};
  const Dim3 grid2{tiles, (p.channels + way.columns2 - 1) / way.columns2};
  const auto expand = way.columns1 == 64 ? forward_expand_kernel<T, 64> : forward_expand_kernel<T, 32>;
  const auto contract = way.columns2 == 64 ? forward_contract_kernel<T, 64> : forward_contract_kernel<T, 32>;
  launch(expand, grid1, THREADS, static_cast<size_t>(first.bytes), stream, problem, first);
  launch_dependent(contract, grid2, THREADS, static_cast<size_t>(second.bytes), stream, problem, second);
}

template <class T>
void forward_tensor(const Problem& problem, const Way& way, Stream stream) {
  if (way.kind == Kind::TILES) return launch_tiles<T>(problem, way, stream);
  if (way.kind == Kind::SPLIT) return launch_split<T>(problem, way, stream);
  const FusedLayout layout(problem.params, way.first.row_bits, way.first.depth);
  launch(forward_fused_kernel<T>, Dim3{tiles_of(problem, way.first.row_bits)}, THREADS,
         static_cast<size_t>(layout.bytes), stream, problem, layout);
}

}  // namespace

void forward_cuda(const Params& params, Stream stream) {
  const Problem problem(params);
  const Way way = choose_way(problem);
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (way.kind != Kind::PLAIN) return forward_tensor<T>(problem, way, stream);
    }
    forward_plain<T>(problem, stream);
  });
}

// On the device that the launch will be on: it decides what fits.
int64_t forward_workspace_cuda(const Params& params) {
  const Problem problem(params);
  const Kind kind = choose_way(problem).kind;
  const int64_t kept = kind == Kind::PLAIN   ? params.hidden
                       : kind == Kind::FUSED ? 0
                                             : params.hidden + params.channels;
  return sizeof_dtype(params.dtype) * problem.tokens * kept;
}

}  // namespace vitkernels::residual_ffn
