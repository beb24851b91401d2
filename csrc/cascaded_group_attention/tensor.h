// Steps that the tensor-core kernels share, forward and backward.
//
// A block holds `count` windows. A window's q, k, v take KEYS rows of shared memory, KEYS being its tokens
// rounded up to 16, 64 or 144, so that a tile of keys never reaches into the next window: what is in the next
// image, a NaN say, cannot come through a probability of zero.
#pragma once
#include "problem.h"

namespace vitkernels::cascaded_group_attention {

using tile_attention::INVALID;
using tile_attention::leading_dimension;

constexpr int MAX_TOKENS =
    144;  // of a window on tensor cores: a row of logits lives in the registers of 4 lanes
constexpr int MAX_KERNEL = 7;  // of the depthwise convolution: its row of inputs too

inline int key_rows(int tokens) {
  return tokens <= 16 ? 16 : tokens <= 64 ? 64 : MAX_TOKENS;
}

// Whether the tensor-core kernels can take these sizes at all; whether they fit is for the layouts to say.
inline bool suits_tensor_cores(const Params& p) {
  bool suits = p.value_dim() % 16 == 0 && p.key_dim % 16 == 0 && p.tokens() <= MAX_TOKENS;
  for (int i = 0; i < p.num_heads; ++i) suits = suits && p.kernel_sizes[i] <= MAX_KERNEL;
  return suits;
}

// The bias table of a head as a signed one, [2 Wh - 1][2 Ww - 1], and token codes with
// entry = code(query) - code(key) + center: one subtraction a logit.
struct BiasCodes {
  int window_w, pitch, center, entries;

  VK_HOST_DEVICE BiasCodes(int window_h, int window_w)
      : window_w(window_w),
        pitch(2 * window_w - 1),
        center((window_h - 1) * pitch + window_w - 1),
        entries((2 * window_h - 1) * pitch) {}
  VK_DEVICE int code(int token) const { return token + token / window_w * (window_w - 1); }

  template <class T>
  VK_DEVICE void stage(float* table, const Problem& problem, int head) const {
    const int middle_y = center / pitch, middle_x = window_w - 1;
    VK_NO_UNROLL
    for (int e = thread_x(); e < entries; e += block_dim_x()) {
      const int dy = e / pitch - middle_y, dx = e % pitch - middle_x;
      const View& view = problem.params.attn_bias;
      const int64_t index = (dy < 0 ? -dy : dy) * window_w + (dx < 0 ? -dx : dx);
      table[e] = read<T>(view, problem.wide_table, head * view.stride[0] + index * view.stride[1]) *
                 Exponential<T>::unit;
    }
  }
};

// A head's live taps as [tap][channel] floats and, behind them, its biases. Reversed, they are those of the
// transposed convolution.
template <class T>
VK_DEVICE void stage_taps(float* taps, const Problem& problem, int head, bool reversed) {
  const int size = problem.params.kernel_sizes[head], channels = problem.params.key_dim;
  const int dead = (problem.params.kernel_max - size) / 2;
  VK_NO_UNROLL
  for (int i = thread_x(); i < size * size * channels; i += block_dim_x()) {
    const int channel = i % channels, tap = i / channels;
    const int from = reversed ? size * size - 1 - tap : tap;
    const View& view = problem.params.dw_weight;
    taps[i] = read<T>(view, problem.wide_weights,
                      head * view.stride[0] + channel * view.stride[1] +
                          (dead + from / size) * view.stride[2] + (dead + from % size) * view.stride[3]);
  }
  VK_NO_UNROLL
  for (int channel = thread_x(); channel < channels; channel += block_dim_x()) {
    const View& view = problem.params.dw_bias;
    taps[size * size * channels + channel] =
        reversed ? 0.0f
                 : read<T>(view, problem.wide_weights, head * view.stride[0] + channel * view.stride[1]);
  }
}

// Depthwise convolution inside `count` windows of `pitch` rows each, zero-padded. A thread makes two
// neighbours of a row for two channels; more of them would leave threads without work. One loop for every
// size of kernel: a block runs through its code once or twice a head, and what it runs for the first time it
// has to fetch.
template <class T>
VK_DEVICE void convolve(const T* in, int ld_in, T* out, int ld_out, const float* taps, const Problem& problem,
                        int head, int count, int pitch) {
  constexpr int RUN = CONVOLVED_RUN;
  using Pair = Vec<float, 2>;
  const int size = problem.params.kernel_sizes[head], half = size / 2;
  const int window_h = problem.params.window_h, window_w = problem.params.window_w;
  const int channels = problem.params.key_dim, pairs = channels / 2, runs = (window_w + RUN - 1) / RUN;
  VK_NO_UNROLL
  for (int task = thread_x(); task < count * window_h * runs * pairs; task += block_dim_x()) {
    const int line = problem.by_channel_pair.divide(task), channel = (task - line * pairs) * 2;
    const int all_y = problem.by_run.divide(line), x0 = (line - all_y * runs) * RUN;
    const int window = problem.by_window_h.divide(all_y), y = all_y - window * window_h;
    const int first_row = window * pitch;
    const auto bias = Pair::load(taps + size * size * channels + channel);
    Pair sums[RUN];
    VK_UNROLL
    for (int j = 0; j < RUN; ++j) sums[j] = bias;
    VK_NO_UNROLL
    for (int ky = 0; ky < size; ++ky) {
      const int from = y + ky - half;
      if (from < 0 || from >= window_h) continue;
      const T* source = in + (first_row + from * window_w) * ld_in + channel;
      const auto input = [&](int x) {
        if (x < 0 || x >= window_w) return Pair{{0.0f, 0.0f}};
        const auto pair = Vec<T, 2>::load(source + x * ld_in);
        return Pair{{to_float(pair[0]), to_float(pair[1])}};
      };
      const float* row = taps + ky * size * channels + channel;
      Pair inputs[RUN], tap = Pair::load(row);
      VK_UNROLL
      for (int j = 0; j < RUN; ++j) inputs[j] = input(x0 - half + j);
      VK_NO_UNROLL
      for (int kx = 0; kx < size; ++kx) {
        // On their way while the present ones are used; behind the last tap lie the biases.
        const Pair next = input(x0 - half + kx + RUN), next_tap = Pair::load(row + (kx + 1) * channels);
        VK_UNROLL
        for (int j = 0; j < RUN; ++j) {
          sums[j][0] += tap[0] * inputs[j][0];
          sums[j][1] += tap[1] * inputs[j][1];
        }
        VK_UNROLL
        for (int j = 0; j + 1 < RUN; ++j) inputs[j] = inputs[j + 1];
        inputs[RUN - 1] = next;
        tap = next_tap;
      }
    }
    VK_UNROLL
    for (int j = 0; j < RUN; ++j) {
      if (x0 + j >= window_w) break;
      T* target = out + (first_row + y * window_w + x0 + j) * ld_out + channel;
      Vec<T, 2>{{from_float<T>(sums[j][0]), from_float<T>(sums[j][1])}}.store(target);
    }
  }
}

// One warp: the logits of 16 queries of a window against its keys, and their exponentials in p, -inf and 0
// where there is no key. A row times its factor is a row of probabilities.
template <class T, int KEYS>
VK_DEVICE void softmax(float (&p)[KEYS / 8][4], float (&factor)[2], const Problem& problem, const T* q,
                       int ld_q, const T* k, int ld_k, const int* key_codes, const float* table,
                       int first_query) {
  using Exp = Exponential<T>;
  constexpr float NOTHING = -INFINITY;
  const int row = first_query + lane_id() / 4, column = lane_id() % 4 * 2, tokens = problem.tokens;
  const BiasCodes codes(problem.params.window_h, problem.params.window_w);
  tile_attention::clear(p);
  tile_attention::TensorCores<T, KEYS>::multiply_rows(p, q + first_query * ld_q, ld_q, k, ld_k,
                                                      problem.params.key_dim, {0, tokens});
  const float scale = static_cast<float>(problem.params.scale * Exp::unit);
  const float* entries[2] = {table + codes.center + key_codes[row < tokens ? row : 0],
                             table + codes.center + key_codes[row + 8 < tokens ? row + 8 : 0]};
  float row_max[2] = {NOTHING, NOTHING}, row_sum[2] = {0.0f, 0.0f};
  VK_UNROLL
  for (int j = 0; j < KEYS / 8; ++j) {
    VK_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int key = key_codes[8 * j + column + c % 2];
      p[j][c] = key == INVALID ? NOTHING : p[j][c] * scale + entries[c / 2][-key];
      row_max[c / 2] = larger(p[j][c], row_max[c / 2]);
    }
  }
  VK_UNROLL
  for (int r = 0; r < 2; ++r) row_max[r] = warp_max<4>(row_max[r]);
  VK_UNROLL
  for (int j = 0; j < KEYS / 8; ++j) {
    VK_UNROLL
    for (int c = 0; c < 4; ++c) {
      p[j][c] = Exp::exp(p[j][c] - row_max[c / 2]);
      row_sum[c / 2] += p[j][c];
    }
  }
  VK_UNROLL
  for (int r = 0; r < 2; ++r) factor[r] = reciprocal_fast(warp_sum<4>(row_sum[r]));
}

// How eight channels of a token move between a map and shared memory.
struct Channels {
  int64_t stride;
  bool vectorized;

  template <class T>
  VK_DEVICE static Channels of(const View& map) {
    const bool aligned = map.stride[0] % 8 == 0 && map.stride[2] % 8 == 0 && map.stride[3] % 8 == 0 &&
                         reinterpret_cast<uintptr_t>(map.data) % (8 * sizeof(T)) == 0;
    return {map.stride[1], map.stride[1] == 1 && aligned};
  }
  // Of `heads`, [windows, tokens, channels].
  template <class T>
  VK_DEVICE static Channels of_heads(const View& heads) {
    const bool aligned = heads.stride[0] % 8 == 0 && heads.stride[1] % 8 == 0 &&
                         reinterpret_cast<uintptr_t>(heads.data) % (8 * sizeof(T)) == 0;
    return {heads.stride[2], heads.stride[2] == 1 && aligned};
  }
  template <class T>
  VK_DEVICE Vec<T, 8> load(const T* source) const {
    if (vectorized) return Vec<T, 8>::load(source);
    Vec<T, 8> values;
    VK_UNROLL
    for (int e = 0; e < 8; ++e) values[e] = source[e * stride];
    return values;
  }
  template <class T>
  VK_DEVICE void store(T* target, const Vec<T, 8>& values) const {
    if (vectorized) return values.store(target);
    VK_UNROLL
    for (int e = 0; e < 8; ++e) target[e * stride] = values[e];
  }
};

// The (row, first channel) pairs of a tile in the order that makes neighbours of a warp neighbours in memory:
// along the channels where they are dense, else along the tokens.
struct Walk {
  int rows, chunks;
  bool channels_first;

  VK_DEVICE Walk(int rows, int channels, const View& map)
      : rows(rows), chunks(channels / 8), channels_first(map.stride[1] == 1) {}
  VK_DEVICE int visits() const { return rows * chunks; }
  VK_DEVICE int row(int i) const { return channels_first ? i / chunks : i % rows; }
  VK_DEVICE int channel(int i) const { return 8 * (channels_first ? i % chunks : i / rows); }
};

template <class T>
VK_DEVICE Vec<T, 8> zeros() {
  Vec<T, 8> values;
  VK_UNROLL
  for (int e = 0; e < 8; ++e) values[e] = from_float<T>(0.0f);
  return values;
}

}  // namespace vitkernels::cascaded_group_attention
