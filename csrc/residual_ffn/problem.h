// What the kernels know of a call, and where the positions of a map lie. A position of an image is a token.
#pragma once
#include "residual_ffn.h"
#include "vitkernels/device.h"
#include "vitkernels/divide.h"

namespace vitkernels::residual_ffn {

inline int64_t sizeof_dtype(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Passed to the kernels by value.
struct Problem {
  Params params;
  int64_t tokens;      // of all images, fewer than 2^31
  Divisor map, width;  // of tokens: into images, into rows
  bool wide;           // the vectors are float beside half precision

  explicit Problem(const Params& p)
      : params(p),
        tokens(p.batch * p.height * p.width),
        map(p.height * p.width),
        width(p.width),
        wide(p.vector_dtype != p.dtype) {
    if (tokens > 0x7fffffff) throw std::runtime_error("residual FFN: more than 2^31 - 1 positions");
  }
};

// A token of a tile.
struct Place {
  int64_t image = 0;
  int y = 0, x = 0;
  bool real = false;

  VK_DEVICE Place(const Problem& problem, int64_t first, int row) : real(first + row < problem.tokens) {
    if (!real) return;
    const int token = static_cast<int>(first) + row;
    const int in_image = problem.map.divide(token),
              line = problem.width.divide(token - in_image * problem.map.value());
    image = in_image;
    y = line;
    x = token - in_image * problem.map.value() - line * problem.width.value();
  }
  VK_DEVICE int64_t offset(const View& map) const {
    return image * map.stride[0] + y * map.stride[2] + x * map.stride[3];
  }
  // A bit for each of the nine positions around that are on the map, row by row.
  VK_DEVICE unsigned around(const Problem& problem) const {
    if (!real) return 0;
    const unsigned above = y > 0 ? 0007u : 0, below = y + 1 < problem.params.height ? 0700u : 0;
    const unsigned left = x > 0 ? 0111u : 0, right = x + 1 < problem.params.width ? 0444u : 0;
    return (above | 0070u | below) & (left | 0222u | right);
  }
};

// An element of a vector, which may be kept in a wider type than the map.
template <class T>
VK_DEVICE accumulate_t<T> read(const View& view, bool wide, int64_t index) {
  return wide ? static_cast<const accumulate_t<T>*>(view.data)[index]
              : to_accumulate(static_cast<const T*>(view.data)[index]);
}

// Element i of a vector; an absent one is all ones.
template <class T>
VK_DEVICE accumulate_t<T> element(const Problem& problem, const View& vector, int i) {
  if (vector.data == nullptr) return accumulate_t<T>(1);
  return read<T>(vector, problem.wide, i * vector.stride[0]);
}

// NaN stays NaN.
template <class Acc>
VK_DEVICE Acc relu(Acc value) {
  return value < Acc(0) ? Acc(0) : value;
}

constexpr int THREADS = 256;

// Any size and dtype, in up to three launches.
template <class T>
void forward_plain(const Problem& problem, Stream stream);

}  // namespace vitkernels::residual_ffn
