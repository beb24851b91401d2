// Forward: the statistics of each row, then y = Phi W^T tile by tile.
//
// Floor: 2 N I G J FLOPs at the matrix rate; x, W and y cross memory once, W comes from L2 for every tile of
// rows. Special functions, at G = 8 in 16 bits: half a one for each element of Phi and each tile of 128
// outputs. A streaming multiprocessor of an H100 does 16 a cycle against 2048 multiply-adds of its tensor
// cores, so they take half the time of the product that they run beside.
#include "hopper.h"

namespace vitkernels::kan_linear {
namespace {

constexpr int STATISTICS_WARPS = 8;
constexpr int STATISTICS_ROWS = 4;  // of a warp, so that as many loads are in flight

// In two passes over the rows, eight bytes a lane at a time. Floor: x once, the second pass finds it in L1.
// The order of the sums does not depend on whether rows are ALIGNED, to eight bytes.
template <bool ALIGNED, class X>
VK_KERNEL void VK_LAUNCH_BOUNDS(32 * STATISTICS_WARPS, 1)
    statistics_kernel(const X* x, int64_t x_row, int64_t rows, int channels, accumulate_t<X> eps,
                      accumulate_t<X>* mean, accumulate_t<X>* rstd) {
  using Acc = accumulate_t<X>;
  constexpr int ROWS = STATISTICS_ROWS, WIDTH = 8 / sizeof(X);
  const int64_t first = (static_cast<int64_t>(block_x()) * STATISTICS_WARPS + warp_id()) * ROWS;
  admit_launch();
  if (first >= rows) return;
  const auto row = [&](int i) { return first + i < rows ? first + i : rows - 1; };
  const auto each_element = [&](const auto& use) {
    for (int c = lane_id() * WIDTH; c < channels; c += 32 * WIDTH) {
      Vec<X, WIDTH> values[ROWS];
      VK_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        const X* const from = x + row(i) * x_row + c;
        if constexpr (ALIGNED) {
          values[i] = Vec<X, WIDTH>::load(from);
        } else {
          VK_UNROLL
          for (int e = 0; e < WIDTH; ++e)
            if (c + e < channels) values[i][e] = from[e];
        }
      }
      VK_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        VK_UNROLL
        for (int e = 0; e < WIDTH; ++e)
          if (ALIGNED || c + e < channels) use(i, to_accumulate(values[i][e]));
      }
    }
  };
  Acc average[ROWS] = {}, rest[ROWS] = {}, squares[ROWS] = {};
  each_element([&](int i, Acc value) { average[i] += value; });
  VK_UNROLL
  for (int i = 0; i < ROWS; ++i) average[i] = warp_sum(average[i]) / channels;
  each_element([&](int i, Acc value) {
    const Acc distance = value - average[i];
    rest[i] += distance;
    squares[i] += distance * distance;
  });
  VK_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    // What the average was rounded by: where all channels are alike, 1 / sqrt(eps) would multiply it.
    const Acc shift = warp_sum(rest[i]) / channels;
    const Acc variance = warp_sum(squares[i]) / channels - shift * shift;
    if (lane_id() != 0 || first + i >= rows) continue;
    mean[first + i] = average[i] + shift;
    rstd[first + i] = Acc(1) / sqrt((variance < Acc(0) ? Acc(0) : variance) + eps);
  }
}

template <class T>
constexpr size_t forward_shared() {
  using C = Config<T>;
  return sizeof(T) * C::BUFFERS * (C::ROWS + C::OUTPUTS) * C::LD + sizeof(float) * 2 * CENTRES;
}

template <class X, class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(Config<T>::THREADS, 1)
    forward_kernel(Problem<X, T> p, T* y, int64_t y_row, int output_tiles) {
  using C = Config<T>;
  constexpr int TILES = C::OUTPUTS / 8, PHI = C::ROWS * C::LD, WEIGHT = C::OUTPUTS * C::LD;
  T* phi = reinterpret_cast<T*>(shared_memory());
  T* weight = phi + C::BUFFERS * PHI;
  float* tables = reinterpret_cast<float*>(weight + C::BUFFERS * WEIGHT);
  const bool narrow = prepare_centres(tables, p);
  const int64_t first_row = static_cast<int64_t>(block_x() / output_tiles) * C::ROWS;
  const int first_output = block_x() % output_tiles * C::OUTPUTS;
  const int outputs = p.outputs - first_output;

  const auto fill = [&](int index) {
    const int buffer = index % C::BUFFERS;
    load_matrix<C::OUTPUTS, C::THREADS>(
        weight + buffer * WEIGHT, C::LD,
        p.weight + first_output * p.weight_row + static_cast<int64_t>(index) * p.width, p.weight_row, outputs,
        p.columns(index), p.padded);
    cp_async_commit();
    make_phi<C::ROWS, C::THREADS>(phi + buffer * PHI, p, first_row, p.rows, index, tables, narrow);
  };
  for (int buffer = 0; buffer < C::BUFFERS; ++buffer)
    clear_padding<C::ROWS, C::THREADS>(phi + buffer * PHI, p);

  accumulate_t<T> sums[TILES][4];
  clear(sums);
  sync_block();
  fill(0);
  VK_NO_UNROLL
  for (int index = 0; index < p.slices; ++index) {
    cp_async_wait<0>();
    sync_block();
    // With two buffers the next tile is made while this one is multiplied: the barrier above has freed its
    // place.
    if (C::BUFFERS == 2 && index + 1 < p.slices) fill(index + 1);
    const int buffer = index % C::BUFFERS;
    Engine<T, 16>::multiply_rows(sums, phi + buffer * PHI + warp_id() * 16 * C::LD, C::LD,
                                 weight + buffer * WEIGHT, C::LD, p.padded, Span{0, C::OUTPUTS});
    if (C::BUFFERS == 1 && index + 1 < p.slices) {
      sync_block();
      fill(index + 1);
    }
  }

  const int g = lane_id() / 4, t = lane_id() % 4;
  VK_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + warp_id() * 16 + g + 8 * half;
    if (row >= p.rows) continue;
    T* to = y + row * y_row + first_output;
    VK_UNROLL
    for (int j = 0; j < TILES; ++j) {
      const int column = 8 * j + 2 * t;
      store_pair<T>(to + column, C::PHI_SCALE * sums[j][2 * half], C::PHI_SCALE * sums[j][2 * half + 1],
                    outputs - column);
    }
  }
}

size_t accumulate_size(const Params& p) {
  return p.x_dtype == DType::f64 ? 8 : 4;
}

}  // namespace

int64_t forward_workspace_cuda(const Params& p) {
  return p.mean ? 0 : 2 * p.rows * static_cast<int64_t>(accumulate_size(p));
}

void forward_cuda(const Params& params, Stream stream) {
  Params p = params;
  if (!p.mean) {
    p.mean.data = p.workspace;
    p.rstd.data = static_cast<char*>(p.workspace) + p.rows * accumulate_size(p);
  }
  with_dtypes(p.weight_dtype, p.x_dtype, [&](auto weight, auto x) {
    using X = decltype(x);
    using T = decltype(weight);
    using Acc = accumulate_t<X>;
    using C = Config<T>;
    const Problem<X, T> problem(p);
    constexpr int WIDTH = 8 / sizeof(X), ROWS = STATISTICS_WARPS * STATISTICS_ROWS;
    const bool aligned = p.channels % WIDTH == 0 && p.x.stride[0] % WIDTH == 0 &&
                         reinterpret_cast<uintptr_t>(p.x.data) % 8 == 0;
    launch(aligned ? statistics_kernel<true, X> : statistics_kernel<false, X>,
           Dim3{(p.rows + ROWS - 1) / ROWS}, 32 * STATISTICS_WARPS, 0, stream, problem.x, problem.x_row,
           p.rows, p.channels, static_cast<Acc>(p.eps), static_cast<Acc*>(p.mean.data),
           static_cast<Acc*>(p.rstd.data));
    if constexpr (C::HALF) {
      if (fits_hopper(problem)) {
        launch_hopper_forward(problem, static_cast<T*>(p.y.data), p.y.stride[0], stream);
        return;
      }
    }
    const int output_tiles = (p.outputs + C::OUTPUTS - 1) / C::OUTPUTS;
    launch(forward_kernel<X, T>, Dim3{(p.rows + C::ROWS - 1) / C::ROWS * output_tiles}, C::THREADS,
           forward_shared<T>(), stream, problem, static_cast<T*>(p.y.data), p.y.stride[0], output_tiles);
  });
}

}  // namespace vitkernels::kan_linear
