// Sixteen tokens and some rows of a weight a block, whose warps share the depth of the product: for so few
// tokens that tiles would leave most of the device idle.
#pragma once
#include "tiles.h"

namespace vitkernels::residual_ffn {

constexpr int SPLIT_BITS = 4, SPLIT_ROWS = 1 << SPLIT_BITS;

// Shared memory of either launch: 16 rows of the left operand, COLUMNS of the weight, and every warp's part
// of the sums.
struct SplitLayout {
  int ld, ld_parts;
  int left, weight, parts, taps;
  Divisor by_chunks;  // of eight channels of a row of `left`
  int64_t bytes;

  // A row of parts is 8 words longer for threads that read along it, 4 for threads that read down a column:
  // those that store it lie between.
  SplitLayout(int columns, int depth, int taps_count, bool along_rows = true)
      : ld(leading_dimension<half_t>(depth)), ld_parts(columns + (along_rows ? 8 : 4)), by_chunks(depth / 8) {
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
  VK_NO_UNROLL
  for (int i = block_y() * THREADS + thread_x(); i < SPLIT_ROWS * chunks; i += blocks * THREADS) {
    const int row = layout.by_chunks.divide(i), chunk = i - row * chunks;
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

}  // namespace vitkernels::residual_ffn
