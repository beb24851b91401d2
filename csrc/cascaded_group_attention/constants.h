// Biases, taps of the depthwise convolution and tables of the forward kernel, as floats in shared memory.
#pragma once
#include "tensor.h"

namespace vitkernels::cascaded_group_attention {

// What a head reads of its biases, taps and table, as floats: [taps of stage_taps()][bias of q~, k,
// v][table].
struct ConstantLayout {
  int bias, table, size;
  int most;   // elements of one kind, rows of taps being one
  int first;  // byte offset of all
  int sets;   // in shared memory: of all heads, or of one at a time where they do not fit
  int proj_bias;
  Divisor by_side, by_key_dim, by_entries, by_pitch, by_qkv_row;

  ConstantLayout(const Problem& problem, int sets, tile_attention::Carver& carver) : sets(sets) {
    const Params& p = problem.params;
    const BiasCodes codes(p.window_h, p.window_w);
    int largest = 0;
    for (int i = 0; i < p.num_heads; ++i) largest = p.kernel_sizes[i] > largest ? p.kernel_sizes[i] : largest;
    bias = (largest * largest + 1) * p.key_dim;
    table = bias + problem.qkv_rows;
    size = round_up(table + codes.entries, 2);
    proj_bias = sets * size;
    first = carver.take<float>(proj_bias + p.channels);
    by_side = Divisor(p.kernel_max);
    by_key_dim = Divisor(p.key_dim);
    by_entries = Divisor(codes.entries);
    by_pitch = Divisor(codes.pitch);
    by_qkv_row = Divisor(problem.qkv_rows);
    const int rows = p.key_dim * p.kernel_max;
    most = rows > codes.entries ? rows : codes.entries;
    most = sets * (most > problem.qkv_rows ? most : problem.qkv_rows);
  }
};

// An element that is on its way: what has been loaded is converted only when it is needed.
template <class T>
struct Constant {
  float wide;
  T narrow;

  VK_DEVICE void load(const View& view, bool is_wide, int64_t index) {
    if (is_wide) {
      wide = static_cast<const float*>(view.data)[index];
    } else {
      narrow = static_cast<const T*>(view.data)[index];
    }
  }
  VK_DEVICE float value(bool is_wide) const { return is_wide ? wide : to_float(narrow); }
};

// The constants of `heads` heads from `first_head` on, and the projection's bias with those of head 0. A
// thread has one element of each kind, and a row of taps, in flight together.
template <class T>
VK_DEVICE void stage_constants(float* constants, const Problem& problem, const ConstantLayout& layout,
                               int first_head, int heads) {
  const Params& params = problem.params;
  const BiasCodes codes(params.window_h, params.window_w);
  const int k = params.key_dim, channels = first_head == 0 ? params.channels : 0;
  const bool wide = problem.wide_weights, wide_table = problem.wide_table;
  VK_NO_UNROLL
  for (int i = thread_x(); i < layout.most || i < channels; i += block_dim_x()) {
    Constant<T> taps[MAX_KERNEL], tap_bias, entry, bias, proj_bias;
    const int channel_slot = layout.by_side.divide(i), tap_slot = layout.by_key_dim.divide(channel_slot);
    const int channel = channel_slot - tap_slot * k, tap_head = first_head + tap_slot;
    const int size = tap_slot < heads ? params.kernel_sizes[tap_head] : 0;
    const int tap_row = i - channel_slot * layout.by_side.value() - (layout.by_side.value() - size) / 2;
    const bool has_taps = tap_row >= 0 && tap_row < size;
    if (has_taps) {
      const View& view = params.dw_weight;
      const int dead = (layout.by_side.value() - size) / 2;
      const int64_t first = tap_head * view.stride[0] + channel * view.stride[1] +
                            (dead + tap_row) * view.stride[2] + dead * view.stride[3];
      VK_UNROLL
      for (int x = 0; x < MAX_KERNEL; ++x)
        if (x < size) taps[x].load(view, wide, first + x * view.stride[3]);
      if (tap_row == 0)
        tap_bias.load(params.dw_bias, wide,
                      tap_head * params.dw_bias.stride[0] + channel * params.dw_bias.stride[1]);
    }
    const int entry_slot = layout.by_entries.divide(i), e = i - entry_slot * codes.entries;
    if (entry_slot < heads) {
      const View& view = params.attn_bias;
      const int y = layout.by_pitch.divide(e), dy = y - (params.window_h - 1),
                dx = e - y * codes.pitch - (params.window_w - 1);
      const int index = (dy < 0 ? -dy : dy) * params.window_w + (dx < 0 ? -dx : dx);
      entry.load(view, wide_table, (first_head + entry_slot) * view.stride[0] + index * view.stride[1]);
    }
    const int bias_slot = layout.by_qkv_row.divide(i), n = i - bias_slot * problem.qkv_rows;
    if (bias_slot < heads)
      bias.load(params.qkv_bias, wide,
                (first_head + bias_slot) * params.qkv_bias.stride[0] + n * params.qkv_bias.stride[1]);
    if (i < channels) proj_bias.load(params.proj_bias, wide, i * params.proj_bias.stride[0]);

    if (has_taps) {
      float* target = constants + tap_slot * layout.size + channel;
      VK_UNROLL
      for (int x = 0; x < MAX_KERNEL; ++x)
        if (x < size) target[(tap_row * size + x) * k] = taps[x].value(wide);
      if (tap_row == 0) target[size * size * k] = tap_bias.value(wide);
    }
    if (entry_slot < heads)
      constants[entry_slot * layout.size + layout.table + e] = entry.value(wide_table) * Exponential<T>::unit;
    if (bias_slot < heads) constants[bias_slot * layout.size + layout.bias + n] = bias.value(wide);
    if (i < channels) constants[layout.proj_bias + i] = proj_bias.value(wide);
  }
}

}  // namespace vitkernels::cascaded_group_attention
