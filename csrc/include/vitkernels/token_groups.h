// The CUDA kernels that merging and unmerging of tokens are made of: sums over the tokens of a group, copies
// to the tokens of a group.
//
// Every thread makes 16 bytes of one row of the result (one channel, where rows do not allow 16 bytes), so
// that neighbours write neighbouring bytes whatever the number of channels, no lane idles, and all that is in
// flight is independent. Each gathers what it needs: no atomics, one fixed order of every sum. The indices
// are read again by each thread of a row, from L1.
#pragma once
#include <stdexcept>

#include "vitkernels/device.h"
#include "vitkernels/divide.h"

namespace vitkernels::token_groups {

constexpr int THREADS = 256;

// The plan: int32, contiguous. Row g of the merged sequence is made of members[starts[g] .. starts[g + 1]).
struct Groups {
  const int32_t *rows, *starts, *members;
  int64_t tokens, merged;

  template <class Params>
  explicit Groups(const Params& p)
      : rows(static_cast<const int32_t*>(p.rows.data)),
        starts(static_cast<const int32_t*>(p.starts.data)),
        members(static_cast<const int32_t*>(p.members.data)),
        tokens(p.tokens),
        merged(p.merged_tokens) {}

  VK_DEVICE const int32_t* members_of(int64_t image) const { return members + image * tokens; }
  VK_DEVICE const int32_t* starts_of(int64_t image) const { return starts + image * (merged + 1); }
  VK_DEVICE int row_of(int64_t image, int token) const { return rows[image * tokens + token]; }
};

// Rows of channels side by side; or, with T a number of its own, one value a row.
template <class T>
struct Rows {
  T* data;
  int64_t image, row;

  explicit Rows(const View& view)
      : data(static_cast<T*>(view.data)), image(view.stride[0]), row(view.stride[1]) {}

  VK_DEVICE T* at(int64_t of_image, int64_t index) const { return data + of_image * image + index * row; }
  // Whether vectors of `width` elements are aligned in every row.
  bool aligned(int width) const {
    return reinterpret_cast<uintptr_t>(data) % (sizeof(T) * width) == 0 && image % width == 0 &&
           row % width == 0;
  }
};

// The shares of the threads. Divisions are multiplications: counts of one image stay below 2^31.
struct Shares {
  Divisor vectors, blocks;  // of a row, of an image
  int rows;

  Shares(int64_t rows_, int64_t vectors_) : rows(static_cast<int>(rows_)) {
    const int64_t items = rows_ * vectors_, blocks_ = (items + THREADS - 1) / THREADS;
    if (items > 0x7fffffff - THREADS)
      throw std::runtime_error("token groups: rows x channels of one image must be below 2^31");
    vectors = Divisor(static_cast<int>(vectors_));
    blocks = Divisor(static_cast<int>(blocks_));
  }

  // Finds the image, the row and the vector of the running thread; false where there is none.
  VK_DEVICE bool find(int64_t& image, int& row, int& vector) const {
    const int of = blocks.divide(block_x());
    const int item = (block_x() - of * blocks.value()) * THREADS + thread_x();
    image = of;
    row = vectors.divide(item);
    vector = item - row * vectors.value();
    return row < rows;
  }
};

// How a sum becomes a row, or a row's gradient that of its tokens.
enum class Scale : int { none, count, sizes };

// result[g] = sum of weight[i] x[i] / scale, or the largest x[i]; sizes[g] = sum of size[i].
template <class T>
struct Gather {
  using Acc = accumulate_t<T>;
  Rows<const T> x;
  Rows<T> result;
  Rows<const Acc> size;  // absent: ones
  Rows<Acc> sizes;       // may be absent
  Scale scale;
};

template <class T, int N, bool LARGEST>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 6) gather_kernel(Shares shares, Groups groups, Gather<T> g) {
  using Acc = accumulate_t<T>;
  int64_t image;
  int row, vector;
  if (!shares.find(image, row, vector)) return;
  const int32_t* starts = groups.starts_of(image) + row;
  const int32_t* members = groups.members_of(image) + starts[0];
  const int count = starts[1] - starts[0];
  const int64_t c = static_cast<int64_t>(vector) * N;

  const bool sized = g.size.data != nullptr, weighted = sized && g.scale == Scale::sizes;
  const bool counts = g.sizes.data != nullptr && vector == 0;  // this thread stores the sum of the sizes
  Acc total = static_cast<Acc>(count);
  if (sized && (counts || weighted)) {
    total = Acc(0);
    for (int m = 0; m < count; ++m) total += *g.size.at(image, members[m]);
  }
  if (counts) *g.sizes.at(image, row) = total;

  T* result = g.result.at(image, row) + c;
  if (count == 1) {  // most groups, in every mode
    Vec<T, N>::load(g.x.at(image, members[0]) + c).store(result);
    return;
  }
  Acc sums[N];
  VK_UNROLL
  for (int e = 0; e < N; ++e) sums[e] = LARGEST ? -Acc(INFINITY) : Acc(0);
  _Pragma("unroll 2")  // two loads in flight; more would cost the short groups their occupancy
      for (int m = 0; m < count; ++m) {
    const int token = members[m];
    const Acc weight = weighted ? *g.size.at(image, token) : Acc(1);
    const auto values = Vec<T, N>::load(g.x.at(image, token) + c);
    VK_UNROLL
    for (int e = 0; e < N; ++e) {
      const Acc x = to_accumulate(values[e]);
      if constexpr (LARGEST) {
        sums[e] = x > sums[e] || x != x ? x : sums[e];  // what is not a number stays
      } else {
        sums[e] += weight * x;
      }
    }
  }
  const Acc divisor = weighted ? total : static_cast<Acc>(count);
  Vec<T, N> out;
  VK_UNROLL
  for (int e = 0; e < N; ++e)
    out[e] = from_accumulate<T>(g.scale == Scale::none ? sums[e] : sums[e] / divisor);
  out.store(result);
}

// result[i] = weight[i] / scale of row g, times row g, for every token i of group g.
template <class T>
struct Spread {
  using Acc = accumulate_t<T>;
  Rows<const T> rows;
  Rows<T> result;
  Rows<const Acc> size;   // absent: ones
  Rows<const Acc> sizes;  // for Scale::sizes
  Scale scale;
};

template <class T, int N>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 6) spread_kernel(Shares shares, Groups groups, Spread<T> s) {
  using Acc = accumulate_t<T>;
  int64_t image;
  int token, vector;
  if (!shares.find(image, token, vector)) return;
  const int row = groups.row_of(image, token);
  const int64_t c = static_cast<int64_t>(vector) * N;
  auto values = Vec<T, N>::load(s.rows.at(image, row) + c);
  if (s.scale != Scale::none) {
    Acc factor;
    if (s.scale == Scale::sizes) {
      const Acc weight = s.size.data == nullptr ? Acc(1) : *s.size.at(image, token);
      factor = weight / *s.sizes.at(image, row);
    } else {
      const int32_t* starts = groups.starts_of(image) + row;
      factor = Acc(1) / static_cast<Acc>(starts[1] - starts[0]);
    }
    VK_UNROLL
    for (int e = 0; e < N; ++e) values[e] = from_accumulate<T>(to_accumulate(values[e]) * factor);
  }
  values.store(s.result.at(image, token) + c);
}

// run(width) with the elements of a vector as a constant: 16 bytes where all rows allow them, else one.
template <class T, class Run, class... Views>
void with_width(int64_t channels, Run run, const Views&... views) {
  constexpr int WIDTH = static_cast<int>(16 / sizeof(T));
  if (channels % WIDTH == 0 && (views.aligned(WIDTH) && ...)) {
    run(std::integral_constant<int, WIDTH>());
  } else {
    run(std::integral_constant<int, 1>());
  }
}

inline Dim3 grid(const Shares& shares, int64_t batch) {
  return {batch * shares.blocks.value()};
}

template <bool LARGEST, class T>
void gather(const Groups& groups, const Gather<T>& g, int64_t batch, int64_t channels, Stream stream) {
  const auto run = [&](auto width) {
    constexpr int N = decltype(width)::value;
    const Shares shares(groups.merged, channels / N);
    launch(gather_kernel<T, N, LARGEST>, grid(shares, batch), THREADS, 0, stream, shares, groups, g);
  };
  with_width<T>(channels, run, g.x, g.result);
}

template <class T>
void spread(const Groups& groups, const Spread<T>& s, int64_t batch, int64_t channels, Stream stream) {
  const auto run = [&](auto width) {
    constexpr int N = decltype(width)::value;
    const Shares shares(groups.tokens, channels / N);
    launch(spread_kernel<T, N>, grid(shares, batch), THREADS, 0, stream, shares, groups, s);
  };
  with_width<T>(channels, run, s.rows, s.result);
}

}  // namespace vitkernels::token_groups
