// Forward of the residual FFN for any size: fp32 and fp64 by fused multiply-adds, half precision of odd
// sizes on tensor cores. Three launches: u, which takes the place of the result; the hidden layer, to the
// workspace [tokens][hidden]; the result, in place.
//
// Bound by the CUDA cores: 67 TFLOP/s in fp32 on an H200 and 4 C H FLOPs a token.
#include "problem.h"
#include "vitkernels/warp_product.h"

namespace vitkernels::residual_ffn {
namespace {

// A block's tile and its four warps', of 32 x 32 each; DEPTH features are staged at once, in rows 16 bytes
// longer.
constexpr int SIDE = 64, DEPTH = 16, PRODUCT_THREADS = 128;
template <class T>
constexpr int LD = DEPTH + 16 / static_cast<int>(sizeof(T));

// Whether neighbouring threads take neighbouring channels of a map, else neighbouring tokens.
VK_DEVICE bool channels_dense(const View& map) {
  return map.stride[1] == 1;
}

template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 1) forward_inputs_kernel(Problem problem) {
  using Acc = accumulate_t<T>;
  const Params& p = problem.params;
  const bool by_channels = channels_dense(p.x);
  const int64_t i = static_cast<int64_t>(block_x()) * THREADS + thread_x();
  if (i >= problem.tokens * p.channels) return;
  const int64_t map = problem.map.value(), image = i / (map * p.channels),
                within = i - image * map * p.channels;
  const int channel = static_cast<int>(by_channels ? within % p.channels : within / map);
  const int position = static_cast<int>(by_channels ? within / p.channels : within % map);
  const Place place(problem, image * map, position);
  const T* x = static_cast<const T*>(p.x.data) + place.offset(p.x) + channel * p.x.stride[1];
  Acc u = to_accumulate(*x);
  if (p.dw_weight.data != nullptr) {
    Acc sum = read<T>(p.dw_bias, problem.wide, channel * p.dw_bias.stride[0]);
    const unsigned around = place.around(problem);
    VK_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      const int dy = tap / 3 - 1, dx = tap % 3 - 1;
      if ((around >> tap & 1) == 0) continue;
      sum += read<T>(p.dw_weight, problem.wide,
                     channel * p.dw_weight.stride[0] + tap / 3 * p.dw_weight.stride[1] +
                         tap % 3 * p.dw_weight.stride[2]) *
             to_accumulate(x[dy * p.x.stride[2] + dx * p.x.stride[3]]);
    }
    u += sum;
  }
  static_cast<T*>(p.out.data)[place.offset(p.out) + channel * p.out.stride[1]] = from_accumulate<T>(u);
}

// Of a [rows][depth] matrix, SIDE rows and DEPTH features; what lies outside of it becomes zero.
// at(row, feature) points at an element.
template <class T, class At>
VK_DEVICE void stage(T* target, bool by_rows, int rows, int features, At at) {
  VK_UNROLL_4
  for (int i = thread_x(); i < SIDE * DEPTH; i += PRODUCT_THREADS) {
    const int row = by_rows ? i % SIDE : i / DEPTH, feature = by_rows ? i / SIDE : i % DEPTH;
    target[row * LD<T> + feature] =
        row < rows && feature < features ? *at(row, feature) : from_accumulate<T>(accumulate_t<T>(0));
  }
}

// EXPAND: hidden = relu(scale1 * (weight1 u) + bias1), u being in out; else
// out = u + scale2 * (weight2 hidden) + bias2.
template <class T, bool EXPAND>
VK_KERNEL void VK_LAUNCH_BOUNDS(PRODUCT_THREADS, 1) forward_plain_kernel(Problem problem) {
  using Acc = accumulate_t<T>;
  const Params& p = problem.params;
  const View& weight = EXPAND ? p.weight1 : p.weight2;
  const int columns = EXPAND ? p.hidden : p.channels, depth = EXPAND ? p.channels : p.hidden;
  const int64_t first = static_cast<int64_t>(block_x()) * SIDE;
  const int first_column = block_y() * SIDE;
  const int rows = static_cast<int>(problem.tokens - first < SIDE ? problem.tokens - first : SIDE);
  auto* offsets = reinterpret_cast<int64_t*>(shared_memory());
  T *left = reinterpret_cast<T*>(offsets + SIDE), *right = left + SIDE * LD<T>;
  auto* const out = static_cast<T*>(p.out.data);
  auto* const hidden = static_cast<T*>(p.workspace) + first * p.hidden;
  const T* const weights = static_cast<const T*>(weight.data) + first_column * weight.stride[0];
  if (thread_x() < rows) offsets[thread_x()] = Place(problem, first, thread_x()).offset(p.out);

  const int row = warp_id() % 2 * 32, column = warp_id() / 2 * 32;
  WarpSums<T, 2> sums;
  clear_sums<T, 2>(sums);
  VK_NO_UNROLL
  for (int k = 0; k < depth; k += DEPTH) {
    const int features = depth - k < DEPTH ? depth - k : DEPTH;
    sync_block();  // the offsets are there, and nobody multiplies any more
    stage(left, EXPAND && !channels_dense(p.out), rows, features, [&](int row, int feature) {
      if constexpr (EXPAND) {
        return out + offsets[row] + (k + feature) * p.out.stride[1];
      } else {
        return hidden + row * static_cast<int64_t>(p.hidden) + k + feature;
      }
    });
    stage(right, weight.stride[1] != 1, columns - first_column, features, [&](int row, int feature) {
      return weights + row * weight.stride[0] + (k + feature) * weight.stride[1];
    });
    sync_block();
    multiply_step<true, true, LD<T>, LD<T>, T, 2>(sums, left + row * LD<T>, right + column * LD<T>, 3);
  }

  const View &scales = EXPAND ? p.scale1 : p.scale2, &biases = EXPAND ? p.bias1 : p.bias2;
  VK_UNROLL
  for (int i = 0; i < 2; ++i) {
    VK_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int n = first_column + column + 16 * i + c / 2 * 8 + lane_id() % 4 * 2 + c % 2;
      if (n >= columns) continue;
      const Acc scale = element<T>(problem, scales, n), bias = element<T>(problem, biases, n);
      VK_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int token = row + 8 * r + lane_id() / 4;
        if (token >= rows) continue;
        const Acc sum = sums[r / 2][i][c / 2][r % 2 * 2 + c % 2] * scale + bias;
        if constexpr (EXPAND) {
          hidden[token * static_cast<int64_t>(p.hidden) + n] = from_accumulate<T>(relu(sum));
        } else {
          T* target = out + offsets[token] + n * p.out.stride[1];
          *target = from_accumulate<T>(to_accumulate(*target) + sum);
        }
      }
    }
  }
}

}  // namespace

template <class T>
void forward_plain(const Problem& problem, Stream stream) {
  const Params& p = problem.params;
  const size_t bytes = SIDE * (sizeof(int64_t) + 2 * LD<T> * sizeof(T));
  const int64_t tiles = (problem.tokens + SIDE - 1) / SIDE;
  launch(forward_inputs_kernel<T>, Dim3{(problem.tokens * p.channels + THREADS - 1) / THREADS}, THREADS, 0,
         stream, problem);
  launch(forward_plain_kernel<T, true>, Dim3{tiles, (p.hidden + SIDE - 1) / SIDE}, PRODUCT_THREADS, bytes,
         stream, problem);
  launch(forward_plain_kernel<T, false>, Dim3{tiles, (p.channels + SIDE - 1) / SIDE}, PRODUCT_THREADS, bytes,
         stream, problem);
}

template void forward_plain<double>(const Problem&, Stream);
template void forward_plain<float>(const Problem&, Stream);
template void forward_plain<half_t>(const Problem&, Stream);
template void forward_plain<bfloat16_t>(const Problem&, Stream);

}  // namespace vitkernels::residual_ffn
