// What the kernels know of a call, and where the positions of a map lie. A position of an image is a token.
#pragma once
#include "residual_ffn.h"
#include "vitkernels/device.h"

namespace vitkernels::residual_ffn {

// Passed to the kernels by value.
struct Problem {
  Params params;
  int64_t tokens;  // of all images
  int map;         // of one
  bool wide;       // the vectors are float beside half precision

  explicit Problem(const Params& p)
      : params(p),
        tokens(p.batch * p.height * p.width),
        map(p.height * p.width),
        wide(p.vector_dtype != p.dtype) {}
};

// A token of a tile.
struct Place {
  int64_t image = 0;
  int y = 0, x = 0;
  bool real = false;

  VK_DEVICE Place(const Problem& problem, int64_t first, int row) {
    const int64_t first_image = first / problem.map;
    const int within = static_cast<int>(first - first_image * problem.map) + row;
    real = first + row < problem.tokens;
    if (!real) return;
    image = first_image + within / problem.map;
    y = within % problem.map / problem.params.width;
    x = within % problem.map % problem.params.width;
  }
  VK_DEVICE int64_t offset(const View& map) const {
    return image * map.stride[0] + y * map.stride[2] + x * map.stride[3];
  }
  // Whether the map has a row or column that is `dy` or `dx` away, for -1, 0 and 1.
  VK_DEVICE bool has(const Problem& problem, int dy, int dx) const {
    return real && y + dy >= 0 && y + dy < problem.params.height && x + dx >= 0 &&
           x + dx < problem.params.width;
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

// The two products on tensor cores; false where they do not fit, and nothing has been done.
template <class T>
bool forward_tensor(const Problem& problem, Stream stream);
// Any size and dtype, in up to three launches.
template <class T>
void forward_plain(const Problem& problem, Stream stream);

}  // namespace vitkernels::residual_ffn
