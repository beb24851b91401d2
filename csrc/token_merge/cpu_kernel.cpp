// Merging on one core, one instruction set.
//
// Floor: x read once, y written once. Most groups are one token, whose row is copied: size x / size is x. The
// others, some of the r destinations, are reduced eight vectors at a time.
#include "cpu_kernel.h"

#include "vitkernels/token_groups_cpu.h"

namespace vitkernels::token_merge {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

namespace {

// A group: its row's number among all images, and its members.
struct Group {
  int64_t image, row;
  const int32_t* members;
  int count;

  Group(const Params& p, int64_t item) : image(item / p.merged_tokens), row(item % p.merged_tokens) {
    const int32_t* starts = static_cast<const int32_t*>(p.starts.data) + item + image;
    members = static_cast<const int32_t*>(p.members.data) + image * p.tokens + starts[0];
    count = starts[1] - starts[0];
  }
};

template <class E>
const E* image_of(const View& view, int64_t b) {
  return static_cast<const E*>(view.data) + b * view.stride[0];
}
template <class E>
E* row_of(const View& view, int64_t b, int64_t row) {
  return static_cast<E*>(view.data) + b * view.stride[0] + row * view.stride[1];
}

// NaN where either is.
template <class T>
VITKERNELS_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return (a >= b) | (a != a) ? a : b;
}

// How many original tokens the tokens of an image stand for; 1 where nothing was said.
template <class T>
struct Sizes {
  const T* data;
  int64_t stride;

  Sizes(const View& view, int64_t b)
      : data(view ? static_cast<const T*>(view.data) + b * view.stride[0] : nullptr),
        stride(view.stride[1]) {}
  T operator[](int64_t token) const { return data ? data[token * stride] : T(1); }
  T sum(const Group& group) const {
    T total = 0;
    for (int i = 0; i < group.count; ++i) total += (*this)[group.members[i]];
    return total;
  }
};

template <class E>
void merge_group(const Params& p, const Group& group, const Sizes<Compute<E>>& size, Compute<E> total) {
  using T = Compute<E>;
  using V = Vec<T>;
  const E* x = image_of<E>(p.x, group.image);
  const int64_t stride = p.x.stride[1], channels = p.channels;
  E* y = static_cast<E*>(p.y.data) + (group.image * p.merged_tokens + group.row) * channels;
  const int32_t* members = group.members;
  const int count = group.count;
  const auto itself = [](V v, int32_t) { return v; };
  const auto add = [](V acc, V v, int32_t) { return acc + v; };
  if (count == 1) {
    copy_row(y, x + members[0] * stride, channels);
  } else if (p.mode == Mode::amax) {
    reduce_rows(
        y, x, stride, members, count, channels, itself, [](V acc, V v, int32_t) { return larger<T>(acc, v); },
        [](V acc) { return acc; });
  } else if (p.mode == Mode::sum) {
    sum_rows(y, x, stride, members, count, channels);
  } else if (p.mode == Mode::mean || !size.data) {
    const T n = static_cast<T>(count);
    reduce_rows(y, x, stride, members, count, channels, itself, add, [&](V acc) { return acc / n; });
  } else {
    reduce_rows(
        y, x, stride, members, count, channels, [&](V v, int32_t token) { return v * size[token]; },
        [&](V acc, V v, int32_t token) { return acc + v * size[token]; }, [&](V acc) { return acc / total; });
  }
}

void forward(const Params& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto element) {
    using E = decltype(element);
    using T = Compute<E>;
    for (int64_t item = begin; item < end; ++item) {
      const Group group(p, item);
      const Sizes<T> size(p.size, group.image);
      const T total = size.sum(group);
      static_cast<T*>(p.sizes.data)[item] = total;
      merge_group<E>(p, group, size, total);
    }
  });
}

// What a token receives of its row's gradient, as a factor.
template <class T>
T share_of(const Params& p, int64_t image, int64_t token, int64_t row) {
  if (p.mode == Mode::sum) return 1;
  const int64_t item = image * p.merged_tokens + row;
  const int32_t* starts = static_cast<const int32_t*>(p.starts.data) + item + image;
  const int count = starts[1] - starts[0];
  if (count == 1) return 1;
  if (p.mode == Mode::mean || !p.size) return T(1) / static_cast<T>(count);
  return Sizes<T>(p.size, image)[token] / static_cast<const T*>(p.sizes.data)[item];
}

template <class E>
void spread(const Params& p, int64_t begin, int64_t end) {
  const int32_t* rows = static_cast<const int32_t*>(p.rows.data);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.tokens, i = item % p.tokens, row = rows[item];
    const Compute<E> share = share_of<Compute<E>>(p, b, i, row);
    const E* from = row_of<E>(p.grad_y, b, row);
    E* to = row_of<E>(p.grad_x, b, i);
    if (share == 1)
      copy_row(to, from, p.channels);
    else
      scale_row(to, from, p.channels, share);
  }
}

// The gradient of a row goes to the members that reach its value, in equal parts. Nobody reaches what is not
// a number, a token alone neither.
template <class E>
void share_among_largest(const Params& p, const Group& group) {
  using T = Compute<E>;
  using V = Vec<T>;
  const E* x = image_of<E>(p.x, group.image);
  const E* y = row_of<E>(p.y, group.image, group.row);
  const E* grad_y = row_of<E>(p.grad_y, group.image, group.row);
  constexpr int L = kLanes<T>;
  for (int64_t c = 0; c < p.channels; c += L) {
    const int rest = static_cast<int>(p.channels - c < L ? p.channels - c : L);
    const V largest = load_first(y + c, rest), gradient = load_first(grad_y + c, rest);
    const V one = broadcast(T(1));
    V reach = {};
    for (int i = 0; i < group.count; ++i)
      reach += load_first(x + group.members[i] * p.x.stride[1] + c, rest) == largest ? one : V{};
    const V share = gradient / reach;
    for (int i = 0; i < group.count; ++i) {
      const int64_t token = group.members[i];
      const V value = load_first(x + token * p.x.stride[1] + c, rest);
      store_first(row_of<E>(p.grad_x, group.image, token) + c, value == largest ? share : V{}, rest);
    }
  }
}

void backward(const Params& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto element) {
    using E = decltype(element);
    if (p.mode != Mode::amax) return spread<E>(p, begin, end);
    for (int64_t item = begin; item < end; ++item) share_among_largest<E>(p, Group(p, item));
  });
}

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel = {forward, backward};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::token_merge
