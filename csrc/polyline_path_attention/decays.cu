#include "decays.h"

namespace vitkernels::polyline_path_attention {
namespace {

constexpr int THREADS = 128;
constexpr int AHEAD = 8;  // elements that a thread loads before it adds them up

// A thread owns a row or a column of one head and walks along it, in index order: the sums of negative
// numbers then never increase, not even by rounding. The first of a line is in no difference of two sums, and
// may be anything, -inf too.
struct Lines {
  int batch, heads, height, width;

  VK_HOST_DEVICE int64_t rows() const { return static_cast<int64_t>(batch) * heads * height; }
  VK_HOST_DEVICE int64_t all() const { return static_cast<int64_t>(batch) * heads * (height + width); }
};
inline Lines lines_of(const Params& params) {
  return {static_cast<int>(params.batch), params.heads, params.height, params.width};
}

struct Line {
  bool down;
  int64_t batch, head;
  int at, length;

  // The numbers of a batch entry and head run fastest over lines, or over heads: whichever lie side by side.
  VK_DEVICE Line(const Lines& lines, int64_t index, bool heads_first) {
    down = index >= lines.rows();
    const int count = down ? lines.width : lines.height;
    int64_t rest = down ? index - lines.rows() : index;
    if (heads_first) {
      head = rest % lines.heads;
      rest /= lines.heads;
      at = static_cast<int>(rest % count);
      batch = rest / count;
    } else {
      at = static_cast<int>(rest % count);
      rest /= count;
      head = rest % lines.heads;
      batch = rest / lines.heads;
    }
    length = down ? lines.height : lines.width;
  }
  VK_DEVICE int64_t plane(const Lines& lines) const {
    return (batch * lines.heads + head) * lines.height * lines.width;
  }
  // A token of the plane.
  VK_DEVICE int index(const Lines& lines, int position) const {
    return down ? position * lines.width + at : at * lines.width + position;
  }
};

// A line's elements in a tensor [batch, height, width, heads], one tensor for each direction.
template <class D>
class Walk {
 public:
  VK_DEVICE Walk(const Line& line, const View& along, const View& downward)
      : data_(line.down ? begin(line, downward, downward.stride[2]) : begin(line, along, along.stride[1])),
        step_(line.down ? downward.stride[1] : along.stride[2]) {}
  VK_DEVICE D& operator[](int position) const { return data_[position * step_]; }

 private:
  VK_DEVICE static D* begin(const Line& line, const View& view, int64_t stride) {
    return static_cast<D*>(view.data) + line.batch * view.stride[0] + line.head * view.stride[3] +
           line.at * stride;
  }

  D* data_;
  int64_t step_;
};

template <class D>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 1)
    cumulate_kernel(Lines lines, View log_decay_w, View log_decay_h, accumulate_t<D>* along,
                    accumulate_t<D>* downward) {
  const int64_t number = static_cast<int64_t>(block_x()) * THREADS + thread_x();
  if (number >= lines.all()) return;
  const Line line(lines, number, true);
  const Walk<const D> source(line, log_decay_w, log_decay_h);
  accumulate_t<D>* target = (line.down ? downward : along) + line.plane(lines);
  double sum = 0.0;
  for (int first = 0; first < line.length; first += AHEAD) {
    double decays[AHEAD];
    VK_UNROLL
    for (int e = 0; e < AHEAD; ++e) {
      const int position = first + e;
      decays[e] = position > 0 && position < line.length ? to_double(source[position]) : 0.0;
    }
    VK_UNROLL
    for (int e = 0; e < AHEAD; ++e) {
      if (first + e >= line.length) break;
      sum += decays[e];
      target[line.index(lines, first + e)] = static_cast<accumulate_t<D>>(sum);
    }
  }
}

template <class D>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 1)
    decay_gradient_kernel(Lines lines, SumGradients gradients, Field field, int rows, View grad_w,
                          View grad_h) {
  using Acc = accumulate_t<D>;
  const int64_t number = static_cast<int64_t>(block_x()) * THREADS + thread_x();
  if (number >= lines.all()) return;
  const Line line(lines, number, false);
  if (!present(line.down ? grad_h : grad_w)) return;
  const Walk<D> target(line, grad_w, grad_h);
  const int64_t plane = line.plane(lines);
  const auto of_tokens = [&](int side) {
    const void* of = line.down ? gradients.of_tokens[1][side] : gradients.of_tokens[0][side];
    return static_cast<const Acc*>(of) + plane;
  };
  const Acc *const of_queries = of_tokens(0), *const of_keys = of_tokens(1);
  const int capacity = field.slab_capacity(rows);
  const int64_t first_tile = (line.batch * lines.heads + line.head) * field.tiles;

  const auto of_sum = [&](int position) {
    const int index = line.index(lines, position);
    double gradient = static_cast<double>(of_queries[index]) + static_cast<double>(of_keys[index]);
    if (gradients.corners[0] == nullptr) return gradient;
    // Every tile with a token in this row has its share of the corner.
    const int row = (line.down ? position : line.at) * lines.width;
    for (int tile = row / rows; tile <= (row + lines.width - 1) / rows; ++tile) {
      const int64_t at = (first_tile + tile) * capacity + index - field.slab_begin(rows, tile);
      VK_UNROLL
      for (int side = 0; side < 2; ++side)
        gradient += static_cast<const Acc*>(gradients.corners[side])[2 * at + (line.down ? 1 : 0)];
    }
    return gradient;
  };
  double sum = 0.0;
  for (int end = line.length; end > 0; end -= AHEAD) {
    double parts[AHEAD];
    VK_UNROLL
    for (int e = 0; e < AHEAD; ++e) parts[e] = end - 1 - e > 0 ? of_sum(end - 1 - e) : 0.0;
    VK_UNROLL
    for (int e = 0; e < AHEAD; ++e) {
      const int position = end - 1 - e;
      if (position < 0) break;
      sum += parts[e];
      // Element 0 influences nothing.
      target[position] = from_accumulate<D>(static_cast<Acc>(position == 0 ? 0.0 : sum));
    }
  }
}

int64_t blocks_for(const Params& params) {
  return (lines_of(params).all() + THREADS - 1) / THREADS;
}

}  // namespace

void cumulate(const Params& params, Stream stream) {
  with_dtype(params.decay_dtype, [&](auto zero) {
    using D = decltype(zero);
    auto* along = static_cast<accumulate_t<D>*>(params.cum.data);
    launch(cumulate_kernel<D>, Dim3{blocks_for(params)}, THREADS, 0, stream, lines_of(params),
           params.log_decay_w, params.log_decay_h, along, along + params.cum.stride[0]);
  });
}

void decay_gradients(const Params& params, const SumGradients& gradients, const Field& field, int rows,
                     Stream stream) {
  with_dtype(params.decay_dtype, [&](auto zero) {
    launch(decay_gradient_kernel<decltype(zero)>, Dim3{blocks_for(params)}, THREADS, 0, stream,
           lines_of(params), gradients, field, rows, params.grad_log_decay_w, params.grad_log_decay_h);
  });
}

}  // namespace vitkernels::polyline_path_attention
