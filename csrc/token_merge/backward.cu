// Backward: each token reads the gradient of its row; with amax each row gives its gradient to the tokens
// that reach the largest value, in equal shares.
//
// Floor: (t + t') C elements over the bandwidth; with amax x is read once more for the share (from L2) and y
// once, (2 t + 2 t') C in all.
#include "token_merge.h"
#include "vitkernels/token_groups.h"

namespace vitkernels::token_merge {
namespace {

using namespace token_groups;

template <class T>
struct Largest {
  Rows<const T> x, y, grad_y;
  Rows<T> grad_x;
};

template <class T, int N>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 4) largest_kernel(Shares shares, Groups groups, Largest<T> p) {
  using Acc = accumulate_t<T>;
  int64_t image;
  int row, vector;
  if (!shares.find(image, row, vector)) return;
  const int32_t* starts = groups.starts_of(image) + row;
  const int32_t* members = groups.members_of(image) + starts[0];
  const int count = starts[1] - starts[0];
  const int64_t c = static_cast<int64_t>(vector) * N;
  const auto largest = Vec<T, N>::load(p.y.at(image, row) + c);
  const auto upstream = Vec<T, N>::load(p.grad_y.at(image, row) + c);

  int reached[N] = {};
  _Pragma("unroll 4") for (int m = 0; m < count; ++m) {
    const auto values = Vec<T, N>::load(p.x.at(image, members[m]) + c);
    VK_UNROLL
    for (int e = 0; e < N; ++e) reached[e] += to_accumulate(values[e]) == to_accumulate(largest[e]) ? 1 : 0;
  }
  Vec<T, N> share;
  VK_UNROLL
  for (int e = 0; e < N; ++e)
    share[e] = from_accumulate<T>(to_accumulate(upstream[e]) / static_cast<Acc>(reached[e]));
  _Pragma("unroll 4") for (int m = 0; m < count; ++m) {
    const int token = members[m];
    const auto values = Vec<T, N>::load(p.x.at(image, token) + c);
    Vec<T, N> out;
    VK_UNROLL
    for (int e = 0; e < N; ++e)
      out[e] = to_accumulate(values[e]) == to_accumulate(largest[e]) ? share[e] : from_float<T>(0.0f);
    out.store(p.grad_x.at(image, token) + c);
  }
}

}  // namespace

void backward_cuda(const Params& p, Stream stream) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Acc = accumulate_t<T>;
    const Groups groups(p);
    if (p.mode == Mode::amax) {
      const Largest<T> l{Rows<const T>(p.x), Rows<const T>(p.y), Rows<const T>(p.grad_y), Rows<T>(p.grad_x)};
      const auto run = [&](auto width) {
        constexpr int N = decltype(width)::value;
        const Shares shares(groups.merged, p.channels / N);
        launch(largest_kernel<T, N>, grid(shares, p.batch), THREADS, 0, stream, shares, groups, l);
      };
      return with_width<T>(p.channels, run, l.x, l.y, l.grad_y, l.grad_x);
    }
    const Scale scale = p.mode == Mode::wavg   ? Scale::sizes
                        : p.mode == Mode::mean ? Scale::count
                                               : Scale::none;
    const Spread<T> s{Rows<const T>(p.grad_y), Rows<T>(p.grad_x), Rows<const Acc>(p.size),
                      Rows<const Acc>(p.sizes), scale};
    spread(groups, s, p.batch, p.channels, stream);
  });
}

}  // namespace vitkernels::token_merge
