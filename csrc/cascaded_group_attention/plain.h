// The plain path: fused multiply-adds in any type, for any size. fp32 and fp64 take it, and half precision
// where the tensor-core kernels do not fit.
//
// A block works on one window at a time. What lies between the steps (q~, k, v, P, ...) is in shared memory
// when a window's share fits, else in the block's slot of a workspace, which stays in L2: the pointers are
// generic, the code is one. Everything there is of type Acc, rounded to T where PyTorch would store a T.
#pragma once
#include "problem.h"

namespace vitkernels::cascaded_group_attention {

// Fills out, and heads when present. Returns 0, or without having done anything how many bytes of
// Params::workspace it needs.
template <class T>
int64_t forward_plain(const Problem& problem, Stream stream);

// Blocks that share the windows, and what each has to itself. Functions of the sizes only.
struct PlainSlots {
  int64_t bytes;  // of one block
  bool shared;
  int64_t blocks;

  PlainSlots(int64_t bytes, int64_t windows) : bytes(bytes), shared(bytes <= tile_attention::SHARED_LIMIT) {
    // Four blocks on each SM of a large device; fewer where the slots would take more than 256 MB.
    const int64_t most = shared || bytes * 528 <= (256 << 20) ? 528 : (256 << 20) / bytes;
    blocks = windows < most ? windows : most < 1 ? 1 : most;
  }
  int64_t workspace() const { return shared ? 0 : bytes * blocks; }
  size_t shared_bytes() const { return shared ? static_cast<size_t>(bytes) : 0; }
  VK_DEVICE char* base(void* workspace) const {
    return shared ? shared_memory() : static_cast<char*>(workspace) + block_x() * bytes;
  }
};

// Pitch of a row of Acc: odd, so that neighbouring rows start in different banks.
VK_HOST_DEVICE int plain_pitch(int columns) {
  return columns | 1;
}

// out(row, column, sum over depth of a(row, k) b(k, column)) for all rows and columns; 4 x 4 sums a thread,
// its neighbours being the next rows, which find the same b. No barrier, neither before nor after.
template <class Acc, class A, class B, class Out>
VK_DEVICE void block_product(int rows, int columns, int depth, A a, B b, Out out) {
  constexpr int SIDE = 4;
  const int row_threads = (rows + SIDE - 1) / SIDE, column_threads = (columns + SIDE - 1) / SIDE;
  VK_NO_UNROLL
  for (int task = thread_x(); task < row_threads * column_threads; task += block_dim_x()) {
    int row[SIDE], column[SIDE];
    Acc sums[SIDE][SIDE];
    VK_UNROLL
    for (int i = 0; i < SIDE; ++i) {
      row[i] = task % row_threads + i * row_threads;
      column[i] = task / row_threads + i * column_threads;
      VK_UNROLL
      for (int j = 0; j < SIDE; ++j) sums[i][j] = Acc(0);
    }
    VK_NO_UNROLL
    for (int k = 0; k < depth; ++k) {
      Acc left[SIDE], right[SIDE];
      VK_UNROLL
      for (int i = 0; i < SIDE; ++i) {
        left[i] = row[i] < rows ? a(row[i], k) : Acc(0);
        right[i] = column[i] < columns ? b(k, column[i]) : Acc(0);
      }
      VK_UNROLL
      for (int i = 0; i < SIDE; ++i) {
        VK_UNROLL
        for (int j = 0; j < SIDE; ++j) sums[i][j] += left[i] * right[j];
      }
    }
    VK_UNROLL
    for (int i = 0; i < SIDE; ++i) {
      VK_UNROLL
      for (int j = 0; j < SIDE; ++j) {
        if (row[i] < rows && column[j] < columns) out(row[i], column[j], sums[i][j]);
      }
    }
  }
}

// y [tokens][ld_y] = [q~ | k | v] of the head, from its input u.
template <class T, class Acc>
VK_DEVICE void plain_qkv(const Problem& problem, int head, const Acc* u, int ld_u, Acc* y, int ld_y) {
  const View &weight = problem.params.qkv_weight, &bias = problem.params.qkv_bias;
  block_product<Acc>(
      problem.tokens, problem.qkv_rows, problem.value_dim, [&](int row, int c) { return u[row * ld_u + c]; },
      [&](int c, int column) {
        return read<T>(weight, problem.wide_weights,
                       head * weight.stride[0] + column * weight.stride[1] + c * weight.stride[2]);
      },
      [&](int row, int column, Acc sum) {
        const int64_t at = head * bias.stride[0] + column * bias.stride[1];
        y[row * ld_y + column] = rounded<T>(sum + read<T>(bias, problem.wide_weights, at));
      });
}

// out(token, channel, sum over the live taps of tap * in(neighbour)), with the taps reversed for the
// transposed convolution.
template <class T, class Acc, class Out>
VK_DEVICE void plain_convolve(const Problem& problem, int head, bool reversed, const Acc* in, int ld_in,
                              Out out) {
  const View& weight = problem.params.dw_weight;
  const int size = problem.params.kernel_sizes[head], dead = (problem.params.kernel_max - size) / 2;
  const int window_w = problem.params.window_w, window_h = problem.params.window_h;
  VK_NO_UNROLL
  for (int task = thread_x(); task < problem.tokens * problem.params.key_dim; task += block_dim_x()) {
    const int token = task % problem.tokens, channel = task / problem.tokens;
    const int y = token / window_w, x = token % window_w;
    Acc sum = Acc(0);
    for (int ky = 0; ky < size; ++ky) {
      const int from_y = y + ky - size / 2;
      if (from_y < 0 || from_y >= window_h) continue;
      for (int kx = 0; kx < size; ++kx) {
        const int from_x = x + kx - size / 2;
        if (from_x < 0 || from_x >= window_w) continue;
        const int ty = dead + (reversed ? size - 1 - ky : ky), tx = dead + (reversed ? size - 1 - kx : kx);
        sum += read<T>(weight, problem.wide_weights,
                       head * weight.stride[0] + channel * weight.stride[1] + ty * weight.stride[2] +
                           tx * weight.stride[3]) *
               in[(from_y * window_w + from_x) * ld_in + channel];
      }
    }
    out(token, channel, sum);
  }
}

// q [tokens][ld_q], the depthwise convolution of q~.
template <class T, class Acc>
VK_DEVICE void plain_queries(const Problem& problem, int head, const Acc* y, int ld_y, Acc* q, int ld_q) {
  const View& bias = problem.params.dw_bias;
  plain_convolve<T>(problem, head, false, y, ld_y, [&](int token, int channel, Acc sum) {
    const int64_t at = head * bias.stride[0] + channel * bias.stride[1];
    q[token * ld_q + channel] = rounded<T>(sum + read<T>(bias, problem.wide_weights, at));
  });
}

// p [tokens][ld_p], the probabilities. Barriers inside.
template <class T, class Acc>
VK_DEVICE void plain_softmax(const Problem& problem, int head, const Acc* q, int ld_q, const Acc* y, int ld_y,
                             Acc* p, int ld_p) {
  using Exp = Exponential<T>;
  const int k = problem.params.key_dim, tokens = problem.tokens;
  const Acc scale = static_cast<Acc>(problem.params.scale * Exp::unit);
  const View& table = problem.params.attn_bias;
  block_product<Acc>(
      tokens, tokens, k, [&](int row, int c) { return q[row * ld_q + c]; },
      [&](int c, int column) { return y[column * ld_y + k + c]; },
      [&](int row, int column, Acc sum) {
        const int64_t at = head * table.stride[0] + problem.bias_index(row, column) * table.stride[1];
        p[row * ld_p + column] =
            sum * scale + read<T>(table, problem.wide_table, at) * static_cast<Acc>(Exp::unit);
      });
  sync_block();
  for (int row = warp_id(); row < tokens; row += block_dim_x() / 32) {
    Acc* logits = p + row * ld_p;
    Acc largest = -INFINITY, sum = Acc(0);
    for (int m = lane_id(); m < tokens; m += 32) largest = logits[m] > largest ? logits[m] : largest;
    largest = warp_max(largest);
    for (int m = lane_id(); m < tokens; m += 32) sum += logits[m] = Exp::exp(logits[m] - largest);
    const Acc factor = Acc(1) / warp_sum(sum);
    for (int m = lane_id(); m < tokens; m += 32) logits[m] *= factor;
  }
  sync_block();
}

}  // namespace vitkernels::cascaded_group_attention
