// The gradients of the two large weights and of their biases, as partial sums over chunks of tokens.
//
// grad W_i = grad_y_i^T U_i and grad W_proj = grad_out^T relu(heads), both [outputs][inputs] sums over the
// tokens of all windows. Floor: 2 (h (2k + d) d + C^2) FLOPs a token, and one read of grad_y, x, grad_out and
// heads, which the tiles of outputs share through L2. A block owns 64 x 64 sums and walks over a chunk of
// tokens, 64 at a time; U_i and relu(heads) are made on the way into shared memory. The biases' gradients are
// column sums of the left tile.
#include "backward.h"

namespace vitkernels::cascaded_group_attention {
namespace {

constexpr int SIDE = 64;  // of a block's sums, and the tokens of a step

template <class T>
constexpr int WIDTH = static_cast<int>(16 / sizeof(T));
template <class T>
constexpr int LD = SIDE + WIDTH<T>;

struct Tasks {
  int qkv_rows, qkv_columns, proj_side;  // tiles of 64
  int qkv, proj;                         // all of them, 0 when not wanted

  explicit Tasks(const Problem& problem) {
    qkv_rows = (problem.qkv_rows + SIDE - 1) / SIDE;
    qkv_columns = (problem.value_dim + SIDE - 1) / SIDE;
    proj_side = (problem.params.channels + SIDE - 1) / SIDE;
    qkv = wants_qkv(problem.params) ? problem.params.num_heads * qkv_rows * qkv_columns : 0;
    proj = wants_proj(problem.params) ? proj_side * proj_side : 0;
  }
};

// WIDTH channels of a row at `source`, zeros from `count` on or where there is no row.
template <class T>
VK_DEVICE Vec<T, WIDTH<T>> load_channels(const T* source, int64_t stride, int count, bool vectorized) {
  if (vectorized && count >= WIDTH<T>) return Vec<T, WIDTH<T>>::load(source);
  Vec<T, WIDTH<T>> values;
  VK_UNROLL
  for (int e = 0; e < WIDTH<T>; ++e) values[e] = e < count ? source[e * stride] : from_float<T>(0.0f);
  return values;
}

// A matrix whose rows are tokens.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;  // between channels
  int channels;
  bool vectorized;

  VK_DEVICE Rows(const View& view, int channel_dimension, int first, int channels)
      : data(static_cast<const T*>(view.data) + first * view.stride[channel_dimension]),
        stride(view.stride[channel_dimension]),
        channels(channels) {
    vectorized = stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int i = 0; i < 4; ++i)
      vectorized = vectorized && (i == channel_dimension || view.stride[i] % WIDTH<T> == 0);
  }
  VK_DEVICE Vec<T, WIDTH<T>> load(int64_t offset, int channel) const {
    const int left = offset < 0 ? 0 : channels - channel;
    return load_channels(data + (offset < 0 ? 0 : offset) + channel * stride, stride, left, vectorized);
  }
};

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 2)
    weight_sums_kernel(Problem problem, Tasks tasks, WeightSums places, View grad_y, int64_t rows_per_chunk,
                       accumulate_t<T>* all_sums) {
  using Acc = accumulate_t<T>;
  using Engine = tile_attention::Engine<T, SIDE>;
  const Params& params = problem.params;
  char* shared = shared_memory();
  auto* left_offsets = reinterpret_cast<int64_t*>(shared);
  int64_t *right_offsets = left_offsets + SIDE, *previous_offsets = right_offsets + SIDE;
  T *left = reinterpret_cast<T*>(previous_offsets + SIDE), *right = left + SIDE * LD<T>;

  const bool is_qkv = block_x() < tasks.qkv;
  int task = is_qkv ? block_x() : block_x() - tasks.qkv;
  const int columns_of = is_qkv ? tasks.qkv_columns : tasks.proj_side;
  const int rows_of = is_qkv ? tasks.qkv_rows : tasks.proj_side;
  const int column0 = task % columns_of * SIDE, row0 = task / columns_of % rows_of * SIDE;
  const int head = task / columns_of / rows_of;
  const int outputs = is_qkv ? problem.qkv_rows : params.channels,
            inputs = is_qkv ? problem.value_dim : params.channels;
  const int64_t tokens = problem.tokens, all = problem.windows * tokens;
  const int64_t begin = static_cast<int64_t>(block_y()) * rows_per_chunk;
  const int64_t end = begin + rows_per_chunk < all ? begin + rows_per_chunk : all;

  const Rows<T> left_rows = is_qkv ? Rows<T>(grad_y, 1, head * outputs + row0, outputs - row0)
                                   : Rows<T>(params.grad_out, 1, row0, outputs - row0);
  const Rows<T> right_rows = is_qkv ? Rows<T>(params.x, 1, head * inputs + column0, inputs - column0)
                                    : Rows<T>(params.heads, 2, column0, inputs - column0);
  const Rows<T> previous_rows(params.heads, 2, head > 0 ? (head - 1) * inputs + column0 : 0,
                              inputs - column0);
  const bool cascades = is_qkv && head > 0;

  Acc sums[4][4];
  tile_attention::clear(sums);
  Acc bias_sum = Acc(0);
  const int warp_row = warp_id() % 4 * 16, warp_column = warp_id() / 4 * 32;

  for (int64_t first = begin; first < end; first += SIDE) {
    if (thread_x() < SIDE) {
      const int64_t row = first + thread_x(), window = row / tokens;
      const int token = static_cast<int>(row - window * tokens);
      const bool real = row < end;
      const int64_t in_heads = Problem::heads_offset(params.heads, window, token);
      left_offsets[thread_x()] = !real                      ? -1
                                 : is_qkv                   ? row * grad_y.stride[0]
                                 : present(params.grad_out) ? problem.offset(params.grad_out, window, token)
                                                            : -1;
      right_offsets[thread_x()] = !real ? -1 : is_qkv ? problem.offset(params.x, window, token) : in_heads;
      previous_offsets[thread_x()] = real ? in_heads : -1;
    }
    sync_block();  // also: the tiles of the step before are through
    constexpr int CHUNKS = SIDE / WIDTH<T>;
    VK_NO_UNROLL
    for (int i = thread_x(); i < SIDE * CHUNKS; i += block_dim_x()) {
      const bool dense = left_rows.stride == 1;
      const int row = dense ? i / CHUNKS : i % SIDE, channel = (dense ? i % CHUNKS : i / SIDE) * WIDTH<T>;
      left_rows.load(left_offsets[row], channel).store(left + row * LD<T> + channel);
    }
    VK_NO_UNROLL
    for (int i = thread_x(); i < SIDE * CHUNKS; i += block_dim_x()) {
      const bool dense = right_rows.stride == 1;
      const int row = dense ? i / CHUNKS : i % SIDE, channel = (dense ? i % CHUNKS : i / SIDE) * WIDTH<T>;
      auto values = right_rows.load(right_offsets[row], channel);
      if (cascades) {
        const auto previous = previous_rows.load(previous_offsets[row], channel);
        VK_UNROLL
        for (int e = 0; e < WIDTH<T>; ++e)
          values[e] = from_accumulate<T>(to_accumulate(previous[e]) + to_accumulate(values[e]));
      } else if (!is_qkv) {
        VK_UNROLL
        for (int e = 0; e < WIDTH<T>; ++e) values[e] = from_accumulate<T>(relu(to_accumulate(values[e])));
      }
      values.store(right + row * LD<T> + channel);
    }
    sync_block();
    Engine::template multiply<true>(sums, left + warp_row, LD<T>, right + warp_column, LD<T>, 4, {0, SIDE});
    if (column0 == 0 && thread_x() < SIDE) {
      for (int row = 0; row < SIDE; ++row) bias_sum += to_accumulate(left[row * LD<T> + thread_x()]);
    }
  }

  Acc* target = all_sums + block_y() * places.elements;
  Acc* weight = target + (is_qkv ? places.qkv_weight + static_cast<int64_t>(head) * outputs * inputs
                                 : places.proj_weight);
  VK_UNROLL
  for (int j = 0; j < 4; ++j) {
    VK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + warp_row + lane_id() / 4 + 8 * half;
      const int column = column0 + warp_column + 8 * j + lane_id() % 4 * 2;
      if (row < outputs)
        tile_attention::store_pair(weight + static_cast<int64_t>(row) * inputs + column, sums[j][2 * half],
                                   sums[j][2 * half + 1], inputs - column);
    }
  }
  if (column0 == 0 && thread_x() < SIDE && row0 + thread_x() < outputs)
    target[(is_qkv ? places.qkv_bias + head * outputs : places.proj_bias) + row0 + thread_x()] = bias_sum;
}

}  // namespace

template <class T>
void weight_sums(const Problem& problem, const Workspace& workspace, Stream stream) {
  const Tasks tasks(problem);
  char* base = static_cast<char*>(problem.params.workspace);
  View grad_y;
  grad_y.data = base + workspace.grad_y;
  grad_y.stride[0] = static_cast<int64_t>(problem.params.num_heads) * problem.qkv_rows;
  grad_y.stride[1] = 1;
  const size_t bytes = 3 * SIDE * sizeof(int64_t) + 2 * SIDE * LD<T> * sizeof(T);
  launch(weight_sums_kernel<T>, Dim3{tasks.qkv + tasks.proj, workspace.chunks}, THREADS, bytes, stream,
         problem, tasks, WeightSums(problem), grad_y, workspace.rows_per_chunk,
         reinterpret_cast<accumulate_t<T>*>(base + workspace.weight_sums));
}

template void weight_sums<double>(const Problem&, const Workspace&, Stream);
template void weight_sums<float>(const Problem&, const Workspace&, Stream);
template void weight_sums<half_t>(const Problem&, const Workspace&, Stream);
template void weight_sums<bfloat16_t>(const Problem&, const Workspace&, Stream);

}  // namespace vitkernels::cascaded_group_attention
