// A block's sums of the gradients of tables, taps and biases, in the tensor-core window kernel.
#pragma once
#include "backward.h"
#include "tensor.h"

namespace vitkernels::cascaded_group_attention {

// The sums of D at each signed offset, over the windows at hand; a thread an entry.
template <class T>
VK_DEVICE void sum_entries(const Problem& problem, const T* d, int ld, int count, int keys,
                           float* entry_sums) {
  const int window_h = problem.params.window_h, window_w = problem.params.window_w;
  const BiasCodes codes(window_h, window_w);
  VK_NO_UNROLL
  for (int e = thread_x(); e < codes.entries; e += block_dim_x()) {
    const int dy = e / codes.pitch - (window_h - 1), dx = e % codes.pitch - (window_w - 1);
    float sum = 0.0f;
    for (int window = 0; window < count; ++window) {
      for (int y = dy > 0 ? dy : 0; y < window_h + (dy < 0 ? dy : 0); ++y) {
        for (int x = dx > 0 ? dx : 0; x < window_w + (dx < 0 ? dx : 0); ++x) {
          const int query = y * window_w + x;
          sum += to_float(d[(window * keys + query) * ld + query - dy * window_w - dx]);
        }
      }
    }
    entry_sums[e] = sum;
  }
}

// Adds a head's share to the block's sums. Each element has one thread; dead taps get zeros.
template <class T>
VK_DEVICE void add_window_sums(const Problem& problem, const WindowSums& places, float* sums, bool first,
                               int head, const float* entry_sums, const T* y, int ld_y, const T* grad_q,
                               int ld_q, int count, int keys) {
  const Params& params = problem.params;
  const int window_h = params.window_h, window_w = params.window_w, k = params.key_dim,
            side = params.kernel_max;
  const BiasCodes codes(window_h, window_w);
  const auto add = [&](int64_t at, float value) { sums[at] = first ? value : sums[at] + value; };
  VK_NO_UNROLL
  for (int entry = thread_x(); entry < problem.tokens; entry += block_dim_x()) {
    const int dy = entry / window_w, dx = entry % window_w;
    float sum = 0.0f;
    for (int flip_y = 0; flip_y < (dy > 0 ? 2 : 1); ++flip_y) {
      for (int flip_x = 0; flip_x < (dx > 0 ? 2 : 1); ++flip_x)
        sum += entry_sums[codes.center + (flip_y ? -dy : dy) * codes.pitch + (flip_x ? -dx : dx)];
    }
    add(places.tables + head * problem.tokens + entry, sum);
  }
  const int size = params.kernel_sizes[head], dead = (side - size) / 2, half = size / 2;
  VK_NO_UNROLL
  for (int i = thread_x(); i < k * side * side; i += block_dim_x()) {
    const int channel = i % k, tap = i / k, ky = tap / side - dead - half, kx = tap % side - dead - half;
    float sum = 0.0f;
    if (ky >= -half && ky <= half && kx >= -half && kx <= half) {
      for (int window = 0; window < count; ++window) {
        for (int row = ky < 0 ? -ky : 0; row < window_h - (ky > 0 ? ky : 0); ++row) {
          const int base = window * keys + row * window_w;
          for (int column = kx < 0 ? -kx : 0; column < window_w - (kx > 0 ? kx : 0); ++column)
            sum += to_float(grad_q[(base + column) * ld_q + channel]) *
                   to_float(y[(base + ky * window_w + column + kx) * ld_y + channel]);
        }
      }
    }
    add(places.taps + (static_cast<int64_t>(head) * k + channel) * side * side + tap, sum);
  }
  VK_NO_UNROLL
  for (int channel = thread_x(); channel < k; channel += block_dim_x()) {
    float sum = 0.0f;
    for (int row = 0; row < count * keys; ++row) sum += to_float(grad_q[row * ld_q + channel]);
    add(places.biases + head * k + channel, sum);
  }
}

}  // namespace vitkernels::cascaded_group_attention
