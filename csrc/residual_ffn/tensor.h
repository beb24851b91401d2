// Steps that the tensor-core kernels share: u of a tile of tokens, and the way of a tile to a map.
//
// Neighbouring threads have neighbouring channels where those are dense in memory (channels-last), else
// neighbouring tokens (NCHW).
#pragma once
#include "problem.h"
#include "vitkernels/tile_product.h"

namespace vitkernels::residual_ffn {

using tile_attention::leading_dimension;

// The share of a thread in a tile of `rows` tokens, a power of two up to THREADS: one row, and its chunks of
// eight channels from `chunk` on in steps of `step`.
struct Share {
  int row, chunk, step;

  VK_DEVICE Share(int row_bits, bool channels_dense) : step(THREADS >> row_bits) {
    row = channels_dense ? thread_x() / step : thread_x() & ((1 << row_bits) - 1);
    chunk = channels_dense ? thread_x() & (step - 1) : thread_x() >> row_bits;
  }
};

// Eight channels of a token in a map.
template <class T>
struct Chunks {
  T* data;
  int64_t stride;
  bool vectorized;

  VK_DEVICE explicit Chunks(const View& map) : data(static_cast<T*>(map.data)), stride(map.stride[1]) {
    vectorized = stride == 1 && map.stride[0] % 8 == 0 && map.stride[2] % 8 == 0 && map.stride[3] % 8 == 0 &&
                 reinterpret_cast<uintptr_t>(data) % (8 * sizeof(T)) == 0;
  }
  VK_DEVICE Vec<T, 8> load(int64_t offset) const {
    if (vectorized) return Vec<T, 8>::load(data + offset);
    Vec<T, 8> values;
    VK_UNROLL
    for (int e = 0; e < 8; ++e) values[e] = data[offset + e * stride];
    return values;
  }
  VK_DEVICE void store(int64_t offset, const Vec<T, 8>& values) const {
    if (vectorized) return values.store(data + offset);
    VK_UNROLL
    for (int e = 0; e < 8; ++e) data[offset + e * stride] = values[e];
  }
};

template <class T>
VK_DEVICE Vec<T, 8> zeros() {
  Vec<T, 8> values;
  VK_UNROLL
  for (int e = 0; e < 8; ++e) values[e] = from_float<T>(0.0f);
  return values;
}

// Floats in shared memory from `count` elements, of which element i lies at offset(i): ones where there are
// none, asynchronously where they are floats side by side (`dense`), eight at a time where they are narrow.
template <class T, class Offset>
VK_DEVICE void stage_floats(float* target, const View& source, bool wide, bool dense, int count,
                            Offset offset) {
  const auto* floats = static_cast<const float*>(source.data);
  if (dense && count % 8 == 0 && reinterpret_cast<uintptr_t>(floats) % 16 == 0 && floats != nullptr) {
    if (wide) {
      VK_NO_UNROLL
      for (int i = 4 * thread_x(); i < count; i += 4 * block_dim_x()) cp_async16(target + i, floats + i);
      return;
    }
    VK_NO_UNROLL
    for (int i = 8 * thread_x(); i < count; i += 8 * block_dim_x()) {
      const auto narrow = Vec<T, 8>::load(static_cast<const T*>(source.data) + i);
      VK_UNROLL
      for (int e = 0; e < 8; e += 4)
        Vec<float, 4>{
            {to_float(narrow[e]), to_float(narrow[e + 1]), to_float(narrow[e + 2]), to_float(narrow[e + 3])}}
            .store(target + i + e);
    }
    return;
  }
  VK_UNROLL_4
  for (int i = thread_x(); i < count; i += block_dim_x())
    target[i] = floats == nullptr ? 1.0f : read<T>(source, wide, offset(i));
}

// The same of `count` elements of a vector from `first` on.
template <class T>
VK_DEVICE void stage_vector(float* target, const Problem& problem, View vector, int first, int count) {
  if (vector.data != nullptr)
    vector.data = static_cast<char*>(vector.data) +
                  first * vector.stride[0] * static_cast<int64_t>(problem.wide ? 4 : sizeof(T));
  stage_floats<T>(target, vector, problem.wide, vector.stride[0] == 1, count,
                  [&](int i) { return i * vector.stride[0]; });
}

// The depthwise convolution's weights, [channels][9] floats, and behind them its biases.
VK_HOST_DEVICE int taps_elements(const Params& params) {
  return params.dw_weight.data == nullptr ? 0 : 10 * params.channels;
}

// Those of `channels` channels from `first` on.
template <class T>
VK_DEVICE void stage_taps(float* taps, const Problem& problem, int first, int channels) {
  const Params& p = problem.params;
  const int64_t* stride = p.dw_weight.stride;
  const bool dense = stride[0] == 9 && stride[1] == 3 && stride[2] == 1;
  View weight = p.dw_weight;
  weight.data = static_cast<char*>(weight.data) + first * stride[0] * (problem.wide ? 4 : sizeof(T));
  stage_floats<T>(taps, weight, problem.wide, dense, 9 * channels,
                  [&](int i) { return i / 9 * stride[0] + i % 9 / 3 * stride[1] + i % 3 * stride[2]; });
  stage_vector<T>(taps + 9 * channels, problem, p.dw_bias, first, channels);
}
template <class T>
VK_DEVICE void stage_taps(float* taps, const Problem& problem) {
  if (problem.params.dw_weight.data != nullptr) stage_taps<T>(taps, problem, 0, problem.params.channels);
}

// A position's four channels around it, as they lie in memory: load(where they begin) of what is there.
template <class T, class Load>
VK_DEVICE void read_around(Vec<T, 4> (&values)[9], unsigned around, const View& map, Load load) {
  VK_UNROLL
  for (int tap = 0; tap < 9; ++tap) {
    VK_UNROLL
    for (int e = 0; e < 4; ++e) values[tap][e] = from_float<T>(0.0f);
    if ((around >> tap & 1) != 0)
      values[tap] = load((tap / 3 - 1) * map.stride[2] + (tap % 3 - 1) * map.stride[3]);
  }
}

// The taps of four channels, and their biases.
struct Taps {
  float taps[36], biases[4];

  VK_DEVICE Taps(const float* from, int channels, int channel) {
    VK_UNROLL
    for (int i = 0; i < 40; i += 4) {
      const auto four = Vec<float, 4>::load(from + (i < 36 ? 9 * channel + i : 9 * channels + channel));
      VK_UNROLL
      for (int e = 0; e < 4; ++e) (i < 36 ? taps[i + e] : biases[e]) = four[e];
    }
  }
  // u of the e-th channel from its nine values, of which the fifth is its own.
  template <class T>
  VK_DEVICE T convolve(const Vec<T, 4> (&values)[9], int e) const {
    float sum = biases[e];
    VK_UNROLL
    for (int i = 0; i < 9; ++i) sum += taps[9 * e + i] * to_float(values[i][e]);
    return from_float<T>(to_float(values[4][e]) + sum);
  }
};

// u of the 2^row_bits tokens from `first` on, to [rows][ld]; rows beyond the last token become zeros.
// `staged` is called between the first reads of x and the first use of the taps: what it waits for then comes
// at the same time.
//
// Where channels are dense a thread keeps to four of them, whose taps stay in its registers: every eight
// threads read theirs from different banks, and a warp's share of a token is dense. Else it keeps to a token,
// and its neighbours need the same taps.
template <class T, class Staged>
VK_DEVICE void make_inputs(T* u, int ld, const Problem& problem, int64_t first, int row_bits,
                           const float* taps, Staged staged) {
  const Params& p = problem.params;
  const Chunks<T> x(p.x);
  if (p.dw_weight.data != nullptr && x.vectorized) {
    // More than THREADS times four channels take several turns.
    const int quads = p.channels / 4, at_once = quads < THREADS ? quads : THREADS;
    const int step = THREADS / at_once, row = thread_x() / at_once, rows = 1 << row_bits;
    bool waiting = true;
    for (int begin = 0; begin < quads; begin += at_once) {
      const int channel = 4 * (begin + thread_x() % at_once);
      const bool mine = row < step && channel < p.channels;
      Vec<T, 4> values[9];
      const auto read = [&](int of_row) {
        const Place place(problem, first, of_row);
        const T* here = x.data + place.offset(p.x) + channel;
        read_around(values, place.around(problem), p.x,
                    [&](int64_t offset) { return Vec<T, 4>::load(here + offset); });
        return place.real;
      };
      bool real = mine && row < rows && read(row);
      if (waiting) staged();  // by all threads
      waiting = false;
      if (!mine) continue;
      const Taps of_channels(taps, p.channels, channel);
      VK_NO_UNROLL
      for (int at = row; at < rows;) {
        Vec<T, 4> sums;
        VK_UNROLL
        for (int e = 0; e < 4; ++e) sums[e] = real ? of_channels.convolve(values, e) : from_float<T>(0.0f);
        sums.store(u + at * ld + channel);
        at += step;
        if (at < rows) real = read(at);
      }
    }
    return;
  }

  const Share share(row_bits, x.stride == 1);
  const Place place(problem, first, share.row);
  const int64_t center = place.offset(p.x);
  const unsigned around = place.around(problem);
  T* const row = u + share.row * ld;
  if (p.dw_weight.data == nullptr) {
    staged();
    VK_NO_UNROLL
    for (int chunk = share.chunk; chunk < p.channels / 8; chunk += share.step)
      (place.real ? x.load(center + 8 * chunk * x.stride) : zeros<T>()).store(row + 8 * chunk);
    return;
  }
  // Four channels at a time, of which the next are on their way. Twice as many would be twice the code, all
  // of which a block runs for the first time and has to fetch.
  const int quads = p.channels / 4, rounds = (quads + share.step - 1) / share.step;
  Vec<T, 4> values[9];
  VK_NO_UNROLL
  for (int round = 0; round <= rounds; ++round) {
    const int coming = share.chunk + round * share.step, quad = coming - share.step;
    Vec<T, 4> next[9];
    const T* here = x.data + center + 4 * coming * x.stride;
    const auto load = [&](int64_t offset) {
      Vec<T, 4> result;
      VK_UNROLL
      for (int e = 0; e < 4; ++e) result[e] = (here + e * x.stride)[offset];
      return result;
    };
    read_around(next, coming < quads ? around : 0, p.x, load);
    if (round == 1) staged();  // by all threads
    if (round > 0 && quad < quads) {
      const Taps of_channels(taps, p.channels, 4 * quad);
      Vec<T, 4> sums;
      VK_UNROLL
      for (int e = 0; e < 4; ++e)
        sums[e] = place.real ? of_channels.convolve(values, e) : from_float<T>(0.0f);
      sums.store(row + 4 * quad);
    }
    VK_UNROLL
    for (int i = 0; i < 9; ++i) values[i] = next[i];
  }
}

// Channels `first_channel` and so on of the tokens of a tile, to the result.
template <class T>
VK_DEVICE void store_outputs(const T* tile, int ld, const Problem& problem, int64_t first, int row_bits,
                             int first_channel, int channels) {
  const Chunks<T> out(problem.params.out);
  const Share share(row_bits, out.stride == 1);
  const Place place(problem, first, share.row);
  if (!place.real) return;
  const int64_t target = place.offset(problem.params.out) + first_channel * out.stride;
  VK_NO_UNROLL
  for (int chunk = share.chunk; chunk < channels / 8; chunk += share.step)
    out.store(target + 8 * chunk * out.stride, Vec<T, 8>::load(tile + share.row * ld + 8 * chunk));
}

}  // namespace vitkernels::residual_ffn
