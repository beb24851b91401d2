// What the kernels know of a call, and where the tokens of the windows lie in a map.
#pragma once
#include "cascaded_group_attention.h"
#include "vitkernels/divide.h"
#include "vitkernels/tile_product.h"

namespace vitkernels::cascaded_group_attention {

using tile_attention::Exponential;
using tile_attention::present;
using tile_attention::round_up;

// Neighbours of a row that a thread of the depthwise convolution makes, see tensor.h.
constexpr int CONVOLVED_RUN = 2;

// Passed to the kernels by value: device code may not call the member functions of Params.
struct Problem {
  Params params;
  int64_t windows;
  int window_columns, windows_per_image;
  int tokens, value_dim, qkv_rows;
  bool wide_weights, wide_table;
  Divisor by_image, by_window_column, by_window_h, by_window_w, by_tokens, by_channel_pair, by_run;

  explicit Problem(const Params& p)
      : params(p),
        windows(p.windows()),
        window_columns(static_cast<int>(p.window_columns())),
        windows_per_image(static_cast<int>(p.window_rows() * p.window_columns())),
        tokens(p.tokens()),
        value_dim(p.value_dim()),
        qkv_rows(p.qkv_rows()),
        wide_weights(p.weight_dtype != p.dtype),
        wide_table(p.table_dtype != p.dtype),
        by_window_h(p.window_h),
        by_window_w(p.window_w),
        by_tokens(tokens),
        by_channel_pair(p.key_dim < 2 ? 1 : p.key_dim / 2),
        by_run((p.window_w + CONVOLVED_RUN - 1) / CONVOLVED_RUN) {
    if (windows > 0x3fffffff)  // so that 32 bits count windows, and a stride beyond them
      throw std::runtime_error("cascaded group attention: more than 2^30 windows");
    if (windows == 0) return;
    by_image = Divisor(windows_per_image);
    by_window_column = Divisor(window_columns);
  }

  // Where channel 0 of a token lies in a map [batch, channels, height, width]; -1 for a padded position.
  VK_DEVICE int64_t offset(const View& map, int64_t window, int token) const {
    if (window >= windows) return -1;
    const int image = by_image.divide(static_cast<int>(window));
    const int place = static_cast<int>(window) - image * windows_per_image;
    const int window_y = by_window_column.divide(place), token_y = by_window_w.divide(token);
    const int64_t y = static_cast<int64_t>(window_y) * params.window_h + token_y;
    const int64_t x = static_cast<int64_t>(place - window_y * window_columns) * params.window_w + token -
                      token_y * params.window_w;
    if (y >= params.height || x >= params.width) return -1;
    return image * map.stride[0] + y * map.stride[2] + x * map.stride[3];
  }
  // The same for `heads` and its gradient, [windows, tokens, channels].
  VK_DEVICE static int64_t heads_offset(const View& heads, int64_t window, int token) {
    return window * heads.stride[0] + token * heads.stride[1];
  }
  VK_DEVICE int bias_index(int query, int key) const {
    const int dy = query / params.window_w - key / params.window_w;
    const int dx = query % params.window_w - key % params.window_w;
    return (dy < 0 ? -dy : dy) * params.window_w + (dx < 0 ? -dx : dx);
  }
};

// An element of a weight or of the table, which may be kept in a wider type than the map.
template <class T>
VK_DEVICE accumulate_t<T> read(const View& view, bool wide, int64_t index) {
  return wide ? static_cast<const accumulate_t<T>*>(view.data)[index]
              : to_accumulate(static_cast<const T*>(view.data)[index]);
}

// What is left of a value once it has been stored as T.
template <class T>
VK_DEVICE accumulate_t<T> rounded(accumulate_t<T> value) {
  return to_accumulate(from_accumulate<T>(value));
}

// NaN stays NaN.
template <class Acc>
VK_DEVICE Acc relu(Acc value) {
  return value < Acc(0) ? Acc(0) : value;
}

constexpr int THREADS = 256;

}  // namespace vitkernels::cascaded_group_attention
