// Backward. dPhi = dY W of a tile of rows and a slice of channels stays on the chip and is contracted with
// phi' over the grid: du, and partial sums for the norm's parameters and the grid. Then the norm's backward
// by rows, and dW = dY^T Phi with Phi made again. Partial sums are added in a fixed order; there are no float
// atomics.
//
// Floor: twice the forward's FLOPs, and its special functions for dW; dY crosses L2 once for each slice of
// channels.
#include "hopper.h"
#include "vitkernels/sum_partials.h"

namespace vitkernels::kan_linear {
namespace {

constexpr int NORM_WARPS = 8;
constexpr int NORM_ROWS = 4;  // of a warp, so that as many loads are in flight
// Of the gradient of the weight: they fill a large GPU about twice.
constexpr int64_t WEIGHT_BLOCKS = 512;

template <class Acc>
struct UResults {
  Acc* grad_u;         // [rows][I], or null
  Acc *scale, *shift;  // partials [row tiles][I]
  Acc* grid;           // partials [row tiles * slices][G], or null
};

// Between two channels of a slice, whose rows lie side by side: four rows of eight channels meet 32 banks.
template <class T>
constexpr int ROW_PITCH = Config<T>::ROWS + 4;

template <class T, class Acc>
size_t u_shared(int slice) {
  using C = Config<T>;
  const size_t tiles = sizeof(T) * 2 * (C::ROWS * (C::GRAD_DEPTH + C::PAD) + C::GRAD_DEPTH * C::LD);
  const size_t sums = sizeof(Acc) * (C::ROWS * C::DEPTH + slice * ROW_PITCH<T>);
  return tiles > sums ? tiles : sums;
}

// Where dPhi of a row and a column lies. Eight rows of four column pairs, as the lanes hold sums, meet 32
// banks, and so do 32 rows of one column.
template <class C>
VK_DEVICE int place_of(int row, int column) {
  return row * C::DEPTH + (column ^ ((row & 1) | (row >> 1 & 3) << 3 | (row >> 3 & 3) << 1));
}

// In half precision four blocks share a multiprocessor, as many as 227 KB of shared memory hold.
template <class X, class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(Config<T>::THREADS, Config<T>::HALF ? 4 : 1)
    u_kernel(Problem<X, T> p, UResults<accumulate_t<X>> results) {
  using C = Config<T>;
  using Acc = accumulate_t<X>;
  constexpr int TILES = C::DEPTH / 8, GRAD_LD = C::GRAD_DEPTH + C::PAD;
  constexpr int GRAD = C::ROWS * GRAD_LD, WEIGHT = C::GRAD_DEPTH * C::LD;
  const int64_t tile = block_x() / p.slices;
  const int index = block_x() % p.slices;
  const int64_t first_row = tile * C::ROWS;
  T* grad = reinterpret_cast<T*>(shared_memory());
  T* weight = grad + 2 * GRAD;

  const auto fill = [&](int step) {
    const int buffer = step % 2, first = step * C::GRAD_DEPTH;
    const int outputs = p.outputs - first < C::GRAD_DEPTH ? p.outputs - first : C::GRAD_DEPTH;
    load_matrix<C::ROWS, C::THREADS>(grad + buffer * GRAD, GRAD_LD, p.grad_y + first_row * p.grad_row + first,
                                     p.grad_row, p.rows - first_row, outputs, C::GRAD_DEPTH);
    load_matrix<C::GRAD_DEPTH, C::THREADS>(
        weight + buffer * WEIGHT, C::LD,
        p.weight + first * p.weight_row + static_cast<int64_t>(index) * p.width, p.weight_row, outputs,
        p.columns(index), p.padded);
    cp_async_commit();
  };
  accumulate_t<T> sums[TILES][4];
  clear(sums);
  const int steps = (p.outputs + C::GRAD_DEPTH - 1) / C::GRAD_DEPTH;
  fill(0);
  VK_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<0>();
    sync_block();
    if (step + 1 < steps) fill(step + 1);
    const int buffer = step % 2;
    Engine<T, C::GRAD_DEPTH>::template multiply<false>(sums, grad + buffer * GRAD + warp_id() * 16 * GRAD_LD,
                                                       GRAD_LD, weight + buffer * WEIGHT, C::LD, p.padded / 8,
                                                       Span{0, C::GRAD_DEPTH});
  }
  sync_block();

  // dPhi to shared memory, where the tiles were, and x, which is there before the gradient of u.
  Acc *grad_phi = reinterpret_cast<Acc*>(shared_memory()), *staged = grad_phi + C::ROWS * C::DEPTH;
  const int g = lane_id() / 4, t = lane_id() % 4;
  VK_UNROLL
  for (int j = 0; j < TILES; ++j) {
    VK_UNROLL
    for (int e = 0; e < 4; ++e)
      grad_phi[place_of<C>(warp_id() * 16 + g + 8 * (e / 2), 8 * j + 2 * t + e % 2)] = sums[j][e];
  }
  const int64_t rows = p.rows - first_row < C::ROWS ? p.rows - first_row : C::ROWS;
  const int left = p.channels - index * p.slice, channels = left < p.slice ? left : p.slice;
  VK_NO_UNROLL
  for (int i = thread_x(); i < rows * channels; i += C::THREADS) {
    const int r = i / channels, c = i - r * channels;
    staged[c * ROW_PITCH<T> + r] = p.normed(first_row + r, index * p.slice + c);
  }
  sync_block();

  // A warp for each channel, rows in the lanes.
  VK_NO_UNROLL
  for (int c = warp_id(); c < channels; c += C::WARPS) {
    const int channel = index * p.slice + c;
    Acc scale = Acc(0), shift = Acc(0);
    VK_NO_UNROLL
    for (int r = lane_id(); r < rows; r += 32) {
      Acc& mine = staged[c * ROW_PITCH<T> + r];
      const Acc normed = mine, u = p.u(normed, channel);
      Acc sum = Acc(0);
      VK_NO_UNROLL
      for (int m = 0; m < p.grids; ++m) {
        const Acc distance = (u - p.grid[m]) * p.inverse;
        const Acc e = decay<C::HALF>(distance);
        Acc& grad = grad_phi[place_of<C>(r, c * p.grids + m)];
        const Acc term = Acc(-2) * p.inverse * grad * phi_of(e) * tanh_of(distance, e);
        sum += term;
        if (results.grid != nullptr) grad = term;
      }
      mine = sum;
      scale += sum * normed;
      shift += sum;
    }
    scale = warp_sum(scale);
    shift = warp_sum(shift);
    if (lane_id() == 0) {
      results.scale[tile * p.channels + channel] = scale;
      results.shift[tile * p.channels + channel] = shift;
    }
  }
  sync_block();
  if (results.grad_u != nullptr) {
    // By rows: a row's channels fill a sector of memory at once.
    VK_NO_UNROLL
    for (int i = thread_x(); i < rows * channels; i += C::THREADS) {
      const int r = i / channels, c = i - r * channels;
      results.grad_u[(first_row + r) * p.channels + index * p.slice + c] = staged[c * ROW_PITCH<T> + r];
    }
  }
  if (results.grid == nullptr) return;
  for (int m = thread_x(); m < p.grids; m += C::THREADS) {
    Acc sum = Acc(0);
    for (int r = 0; r < rows; ++r)
      for (int k = m; k < p.columns(index); k += p.grids) sum -= grad_phi[place_of<C>(r, k)];
    results.grid[static_cast<int64_t>(block_x()) * p.grids + m] = sum;
  }
}

// dx = rstd * (w - mean(w) - normed * mean(w * normed)) with w = du * gamma; a warp for a few rows.
template <class X, class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(32 * NORM_WARPS, 1)
    norm_kernel(Problem<X, T> p, const accumulate_t<X>* grad_u, X* grad_x, int64_t grad_x_row) {
  using Acc = accumulate_t<X>;
  const int64_t first = (static_cast<int64_t>(block_x()) * NORM_WARPS + warp_id()) * NORM_ROWS;
  if (first >= p.rows) return;
  const auto row = [&](int i) { return first + i < p.rows ? first + i : p.rows - 1; };
  Acc mean[NORM_ROWS], rstd[NORM_ROWS], sum[NORM_ROWS], projection[NORM_ROWS];
  VK_UNROLL
  for (int i = 0; i < NORM_ROWS; ++i) {
    mean[i] = p.mean[row(i)];
    rstd[i] = p.rstd[row(i)];
    sum[i] = projection[i] = Acc(0);
  }
  // run(i, w, normed) for every row's element of a channel.
  const auto visit = [&](int c, const auto& run) {
    const Acc gamma = p.ln_weight[c];
    Acc w[NORM_ROWS], normed[NORM_ROWS];
    VK_UNROLL
    for (int i = 0; i < NORM_ROWS; ++i) {
      w[i] = grad_u[row(i) * p.channels + c] * gamma;
      normed[i] = (to_accumulate(p.x[row(i) * p.x_row + c]) - mean[i]) * rstd[i];
    }
    VK_UNROLL
    for (int i = 0; i < NORM_ROWS; ++i) run(i, w[i], normed[i]);
  };
  for (int c = lane_id(); c < p.channels; c += 32)
    visit(c, [&](int i, Acc w, Acc normed) {
      sum[i] += w;
      projection[i] += w * normed;
    });
  VK_UNROLL
  for (int i = 0; i < NORM_ROWS; ++i) {
    sum[i] = warp_sum(sum[i]) / p.channels;
    projection[i] = warp_sum(projection[i]) / p.channels;
  }
  for (int c = lane_id(); c < p.channels; c += 32)
    visit(c, [&](int i, Acc w, Acc normed) {
      if (first + i < p.rows)
        grad_x[(first + i) * grad_x_row + c] =
            from_accumulate<X>((w - sum[i] - normed * projection[i]) * rstd[i]);
    });
}

template <class T>
constexpr size_t weight_shared() {
  using C = Config<T>;
  return sizeof(T) * 2 * C::WEIGHT_ROWS * (C::ROWS + C::PAD + C::LD) + sizeof(float) * 2 * CENTRES;
}

// A tile of dW over `share` rows, as partials [shares][J][I * G] of R.
template <class X, class T, class R>
VK_KERNEL void VK_LAUNCH_BOUNDS(Config<T>::THREADS, 1)
    weight_kernel(Problem<X, T> p, R* result, int64_t result_row, int64_t result_share, int64_t share) {
  using C = Config<T>;
  constexpr int TILES = C::DEPTH / 8, ROWS = C::WEIGHT_ROWS, GRAD_LD = C::ROWS + C::PAD;
  constexpr int GRAD = ROWS * GRAD_LD, PHI = ROWS * C::LD;
  const int first_output = block_x() / p.slices * C::ROWS, index = block_x() % p.slices;
  const int outputs = p.outputs - first_output < C::ROWS ? p.outputs - first_output : C::ROWS;
  const int64_t begin = block_y() * share, end = begin + share < p.rows ? begin + share : p.rows;
  T* phi = reinterpret_cast<T*>(shared_memory());
  T* grad = phi + 2 * PHI;
  float* tables = reinterpret_cast<float*>(grad + 2 * GRAD);
  const bool narrow = prepare_centres(tables, p);

  const auto fill = [&](int step) {
    const int buffer = step % 2;
    const int64_t row = begin + static_cast<int64_t>(step) * ROWS;
    load_matrix<ROWS, C::THREADS>(grad + buffer * GRAD, GRAD_LD, p.grad_y + row * p.grad_row + first_output,
                                  p.grad_row, end - row, outputs, C::ROWS);
    cp_async_commit();
    make_phi<ROWS, C::THREADS>(phi + buffer * PHI, p, row, end, index, tables, narrow);
  };
  for (int buffer = 0; buffer < 2; ++buffer) clear_padding<ROWS, C::THREADS>(phi + buffer * PHI, p);
  accumulate_t<T> sums[TILES][4];
  clear(sums);
  const int steps = static_cast<int>((end - begin + ROWS - 1) / ROWS);
  sync_block();
  fill(0);
  VK_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<0>();
    sync_block();
    if (step + 1 < steps) fill(step + 1);
    const int buffer = step % 2;
    Engine<T, ROWS>::template multiply<true>(sums, grad + buffer * GRAD + warp_id() * 16, GRAD_LD,
                                             phi + buffer * PHI, C::LD, p.padded / 8, Span{0, ROWS});
  }

  const int g = lane_id() / 4, t = lane_id() % 4, columns = p.columns(index);
  R* target = result + block_y() * result_share + static_cast<int64_t>(index) * p.width;
  VK_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int output = first_output + warp_id() * 16 + g + 8 * half;
    if (output >= p.outputs) continue;
    R* to = target + output * result_row;
    VK_UNROLL
    for (int j = 0; j < TILES; ++j) {
      const int column = 8 * j + 2 * t;
      store_pair<R>(to + column, C::PHI_SCALE * sums[j][2 * half], C::PHI_SCALE * sums[j][2 * half + 1],
                    columns - column);
    }
  }
}

// Where everything lies in the workspace.
template <class X, class T>
struct Plan {
  using Acc = accumulate_t<X>;
  using C = Config<T>;
  int64_t row_tiles, weight_tiles, share, shares;
  int64_t scale = 0, shift = 0, grid = 0, grad_u = 0, weight = 0, size = 0;  // bytes

  Plan(const Params& p, const Problem<X, T>& problem) {
    row_tiles = (p.rows + C::ROWS - 1) / C::ROWS;
    weight_tiles = (p.outputs + C::ROWS - 1) / C::ROWS * problem.slices;
    const int64_t gradient = p.outputs * p.depth() * static_cast<int64_t>(sizeof(Acc));
    shares = WEIGHT_BLOCKS / weight_tiles;
    if (shares > PARTIAL_BYTES / gradient) shares = PARTIAL_BYTES / gradient;
    if (shares < 1) shares = 1;
    const int64_t rows = (p.rows + shares - 1) / shares;
    share = (rows + C::WEIGHT_ROWS - 1) / C::WEIGHT_ROWS * C::WEIGHT_ROWS;
    shares = (p.rows + share - 1) / share;
    if (p.wants_u()) {
      scale = take(row_tiles * p.channels);
      shift = take(row_tiles * p.channels);
      if (p.grad_grid) grid = take(row_tiles * problem.slices * p.grids);
      if (p.grad_x) grad_u = take(p.rows * p.channels);
    }
    if (!p.grad_weight) return;
    // Enough for either kernel, whichever device is current.
    int64_t partials = shares;
    if (C::HALF && p.grids == CENTRES) {
      const WeightShares hopper(p.rows, p.channels, p.outputs);
      if (hopper.shares > partials) partials = hopper.shares;
    }
    if (partials > 1) weight = take(partials * p.outputs * p.depth());
  }
  int64_t take(int64_t count) {
    const int64_t place = size;
    size += (count * static_cast<int64_t>(sizeof(Acc)) + 255) / 256 * 256;
    return place;
  }
  Acc* at(const Params& p, int64_t place) const {
    return reinterpret_cast<Acc*>(static_cast<char*>(p.workspace) + place);
  }
};

template <class X, class T>
void u_gradients(const Params& p, const Problem<X, T>& problem, const Plan<X, T>& plan, Stream stream) {
  using Acc = accumulate_t<X>;
  using C = Config<T>;
  const UResults<Acc> results{p.grad_x ? plan.at(p, plan.grad_u) : nullptr, plan.at(p, plan.scale),
                              plan.at(p, plan.shift), p.grad_grid ? plan.at(p, plan.grid) : nullptr};
  int64_t row_tiles = plan.row_tiles;
  const auto plain = [&] {
    launch(u_kernel<X, T>, Dim3{plan.row_tiles * problem.slices}, C::THREADS, u_shared<T, Acc>(problem.slice),
           stream, problem, results);
  };
  if constexpr (C::HALF) {
    if (!p.grad_grid && fits_hopper_gradient(problem)) {
      static_assert(U_ROWS >= C::ROWS, "partial sums would not fit");
      row_tiles = (p.rows + U_ROWS - 1) / U_ROWS;
      launch_hopper_u(problem, results.grad_u, results.scale, results.shift, stream);
    } else {
      plain();
    }
  } else {
    plain();
  }
  const auto sum = [&](const View& target, DType dtype, const Acc* partials, int64_t count, int width) {
    const auto store = [&](auto element) {
      using R = decltype(element);
      sum_partials(partials, width, count, width, StoreRows<R>{static_cast<R*>(target.data), 0, width},
                   stream);
    };
    if (!target) return;
    if (dtype == p.x_dtype) {
      store(X{});
    } else {
      store(float{});
    }
  };
  sum(p.grad_ln_weight, p.ln_weight_dtype, results.scale, row_tiles, p.channels);
  sum(p.grad_ln_bias, p.ln_bias_dtype, results.shift, row_tiles, p.channels);
  sum(p.grad_grid, p.grid_dtype, results.grid, plan.row_tiles * problem.slices, p.grids);
  if (p.grad_x)
    launch(norm_kernel<X, T>, Dim3{(p.rows + NORM_WARPS * NORM_ROWS - 1) / (NORM_WARPS * NORM_ROWS)},
           32 * NORM_WARPS, 0, stream, problem, results.grad_u, static_cast<X*>(p.grad_x.data),
           p.grad_x.stride[0]);
}

template <class X, class T>
void weight_gradient(const Params& p, const Problem<X, T>& problem, const Plan<X, T>& plan, Stream stream) {
  using Acc = accumulate_t<X>;
  using C = Config<T>;
  T* const target = static_cast<T*>(p.grad_weight.data);
  Acc* const partials = plan.at(p, plan.weight);
  const int64_t row = p.grad_weight.stride[0], elements = p.outputs * p.depth();
  // run(result, its row and share) does one or all shares.
  const auto with_shares = [&](int64_t shares, const auto& run) {
    if (shares == 1) return run(target, row, int64_t{0});
    run(partials, p.depth(), elements);
    sum_partials(static_cast<const Acc*>(partials), elements, shares, elements,
                 StoreRows<T>{target, row, p.depth()}, stream);
  };
  if constexpr (C::HALF) {
    if (fits_hopper_gradient(problem)) {
      const WeightShares shares(p.rows, p.channels, p.outputs);
      return with_shares(shares.shares, [&](auto* result, int64_t result_row, int64_t result_share) {
        launch_hopper_weight(problem, shares, result, result_row, result_share, stream);
      });
    }
  }
  with_shares(plan.shares, [&](auto* result, int64_t result_row, int64_t result_share) {
    using R = std::decay_t<decltype(*result)>;
    launch(weight_kernel<X, T, R>, Dim3{plan.weight_tiles, plan.shares}, C::THREADS, weight_shared<T>(),
           stream, problem, result, result_row, result_share, plan.share);
  });
}

}  // namespace

int64_t backward_workspace_cuda(const Params& p) {
  return with_dtypes(p.weight_dtype, p.x_dtype, [&](auto weight, auto x) {
    using X = decltype(x);
    using T = decltype(weight);
    return Plan<X, T>(p, Problem<X, T>(p)).size;
  });
}

void backward_cuda(const Params& p, Stream stream) {
  with_dtypes(p.weight_dtype, p.x_dtype, [&](auto weight, auto x) {
    using X = decltype(x);
    using T = decltype(weight);
    const Problem<X, T> problem(p);
    const Plan<X, T> plan(p, problem);
    if (p.wants_u()) u_gradients(p, problem, plan, stream);
    if (p.grad_weight) weight_gradient(p, problem, plan, stream);
  });
}

}  // namespace vitkernels::kan_linear
