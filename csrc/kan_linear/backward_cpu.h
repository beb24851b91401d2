// The backward pass of the FasterKAN layer on the CPU, for a slice of channels and all rows at a time.
//
// The slice of the weight is packed once. Then, block of rows by block: dPhi = dY W in scratch, contracted
// with phi' where it lies, which leaves Phi for dW += dY^T Phi.
#pragma once
#include "cpu_kernel.h"
#include "product_cpu.h"

namespace vitkernels::kan_linear::VITKERNELS_ISA {

template <class T>
struct Shared {
  T *grad_u, *grad_grid;  // [rows][I], [I * G]
  size_t size;

  Shared(const Params& p, Scratch scratch) {
    grad_u = scratch.take<T>(p.grad_x ? static_cast<size_t>(p.rows) * p.channels : 0);
    grad_grid = scratch.take<T>(p.grad_grid ? static_cast<size_t>(p.depth()) : 0);
    size = scratch.used;
  }
};

template <class T>
struct BackwardScratch {
  int depth, width, panels;  // of Phi and dPhi: I * G of the slice, padded to panels
  T *tables, *weight, *grad_y, *grad_y_t, *grad_phi, *phi, *row, *u, *normed, *up, *down, *grad_u,
      *norm_grads, *grid_grads, *grad_weight, *edge;
  size_t size;

  BackwardScratch(const Params& p, const Cut& cut, bool convert, Scratch scratch) {
    const size_t channels = round_up_lanes<T>(cut.channels), outputs = p.outputs;
    depth = cut.channels * p.grids;
    panels = ceil_div(depth, kWidth<T>);
    width = panels * kWidth<T>;
    const size_t block = p.rows < kBlock ? p.rows : kBlock;
    const bool u_wanted = p.wants_u();
    tables = scratch.take<T>(Basis<T>::size(p.grids));
    weight = scratch.take<T>(u_wanted ? outputs * width : 0);
    grad_y = scratch.take<T>(u_wanted && convert ? block * (kDepth + kLanes<T>) : 0);
    grad_y_t = scratch.take<T>(p.grad_weight ? ceil_div(p.outputs, kRows) * (kRows * block + kLanes<T>) : 0);
    grad_phi = scratch.take<T>(u_wanted ? block * width + 2 * kLanes<T> : 0);
    phi = scratch.take<T>(p.grad_weight ? block * width : 0);
    row = scratch.take<T>(width + 2 * kLanes<T>);
    u = scratch.take<T>(channels);
    normed = scratch.take<T>(channels);
    up = scratch.take<T>(channels);
    down = scratch.take<T>(channels);
    norm_grads = scratch.take<T>(2 * channels);
    grid_grads = scratch.take<T>(p.grad_grid ? width + 2 * kLanes<T> : 0);
    grad_weight = scratch.take<T>(p.grad_weight && convert ? outputs * width : 0);
    edge = scratch.take<T>(kRows * kWidth<T>);
    size = scratch.used;
  }
};

// The rows' u, what the basis takes of it, phi of each row into `phi` panels [panel][row][kWidth], and where
// dPhi is given the gradient of u and of everything below it.
template <bool Compact, class X, class T>
void contract(const Params& p, const Basis<T>& basis, const BackwardScratch<T>& w, const Shared<T>& shared,
              int64_t start, int rows, int first, int channels) {
  constexpr int L = kLanes<T>;
  const T* mean = static_cast<const T*>(p.mean.data) + start;
  const T* rstd = static_cast<const T*>(p.rstd.data) + start;
  const T* gamma = static_cast<const T*>(p.ln_weight.data) + first;
  const T* beta = static_cast<const T*>(p.ln_bias.data) + first;
  const int grids = p.grids, depth = channels * grids;
  const bool u_wanted = p.wants_u();
  const T inverse = static_cast<T>(p.inv_denominator), slope_factor = static_cast<T>(-8 * p.inv_denominator);
  T* norm_grads[2] = {w.norm_grads, w.norm_grads + round_up_lanes<T>(channels)};
  for (int r = 0; r < rows; ++r) {
    const X* x = row_of<const X>(p.x, start + r) + first;
    for (int c = 0; c < channels; c += L) {
      const int count = imin(L, channels - c);
      const Vec<T> normed = ((count == L ? load(x + c) : load_first(x + c, count)) - mean[r]) * rstd[r];
      Vec<T> up, down;
      const Vec<T> g = count == L ? load(gamma + c) : load_first(gamma + c, count);
      const Vec<T> b = count == L ? load(beta + c) : load_first(beta + c, count);
      basis.template enter<Compact>(normed * g + b, up, down, basis);
      store(w.normed + c, normed);
      store(w.up + c, up);
      store(w.down + c, down);
    }
    const T* grad_phi = w.grad_phi + static_cast<size_t>(r) * w.width;
    for (int c = 0; c < channels; c += L) {
      const int count = imin(L, channels - c);
      Vec<T> sums[L];
#pragma GCC unroll 1
      for (int i = 0; i < L; ++i) {
        sums[i] = Vec<T>{};
        if (i >= count) continue;
        const Vec<T> up = broadcast(w.up[c + i]), down = broadcast(w.down[c + i]);
        const int k = (c + i) * grids;
        for (int m = 0; m < grids; m += L) {
          Vec<T> quarter, tanh;
          basis.template at<Compact>(up, down, load(basis.falling + m), load(basis.rising + m), quarter, tanh,
                                     inverse);
          // A short vector's end is overwritten by the next channel, whose places it takes.
          store(w.row + k + m, T(4) * quarter);
          if (!u_wanted) continue;
          Vec<T> d = load(grad_phi + k + m) * (quarter * tanh);
          if (m + L > grids) d = load(basis.inside + m) != T(0) ? d : Vec<T>{};
          sums[i] += d;
          if (p.grad_grid) store(w.grid_grads + k + m, load(w.grid_grads + k + m) - d);
        }
      }
      if (!u_wanted) continue;
      transpose<T>(sums);
#pragma GCC unroll 4
      for (int half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
      const Vec<T> grad_u = sums[0] * slope_factor;
      store(norm_grads[0] + c, load(norm_grads[0] + c) + grad_u * load(w.normed + c));
      store(norm_grads[1] + c, load(norm_grads[1] + c) + grad_u);
      if (p.grad_x) {
        T* to = shared.grad_u + (start + r) * p.channels + first + c;
        count == L ? store(to, grad_u) : store_first(to, grad_u, count);
      }
    }
    if (!p.grad_weight) continue;
    for (int i = depth; i < w.width; ++i) w.row[i] = 0;
    for (int panel = 0; panel < w.panels; ++panel) {
      T* to = w.phi + (static_cast<size_t>(panel) * rows + r) * kWidth<T>;
      store(to, load(w.row + panel * kWidth<T>));
      store(to + L, load(w.row + panel * kWidth<T> + L));
    }
  }
}

// dPhi [row][k] = dY W for a block of rows; the weight lies in panels [panel][j][kWidth].
template <class W, class T>
void multiply_weight(const Params& p, const BackwardScratch<T>& w, int64_t start, int rows, int panels) {
  for (int j = 0; j < p.outputs; j += kDepth) {
    Product<T> product{};
    product.rows = rows;
    product.depth = imin(kDepth, p.outputs - j);
    product.a_k = 1;
    if constexpr (kSame<W, T>) {
      product.a = row_of<const T>(p.grad_y, start) + j;
      product.a_row = p.grad_y.stride[0];
    } else {
      product.a_row = kDepth + kLanes<T>;
      product.a = w.grad_y;
      for (int r = 0; r < rows; ++r)
        convert_row(w.grad_y + r * product.a_row, row_of<const W>(p.grad_y, start + r) + j, product.depth);
    }
    product.b_k = kWidth<T>;
    product.c_row = product.add_row = w.width;
    for (int panel = 0; panel < panels; ++panel) {
      product.b = w.weight + (static_cast<size_t>(panel) * p.outputs + j) * kWidth<T>;
      product.c = w.grad_phi + panel * kWidth<T>;
      product.add = j ? product.c : nullptr;
      multiply_panel<T>(product);
    }
  }
}

// dW [j][k] += dY^T Phi of a block of rows.
template <class W, class T>
void add_weight_gradient(const Params& p, const BackwardScratch<T>& w, int64_t start, int rows,
                         bool first_block, T* to, int64_t to_row, int depth) {
  constexpr int L = kLanes<T>;
  // dY in groups [group][row][kRows]. Each vector's end is overwritten by the next row of its group.
  const size_t pitch = static_cast<size_t>(kRows) * rows + L;
  for (int r = 0; r < rows; ++r) {
    const W* from = row_of<const W>(p.grad_y, start + r);
    for (int j = 0; j < p.outputs; j += kRows) {
      const int count = imin(kRows, p.outputs - j);
      T* to = w.grad_y_t + j / kRows * pitch + static_cast<size_t>(r) * count;
      for (int i = 0; i < count; i += L)
        store(to + i, j + i + L <= p.outputs ? load(from + j + i)
                                             : load_first(from + j + i, imin(L, p.outputs - j - i)));
    }
  }
  for (int j = 0; j < p.outputs; j += kRows) {
    Product<T> product{};
    product.rows = imin(kRows, p.outputs - j);
    product.depth = rows;
    product.a = w.grad_y_t + j / kRows * pitch;
    product.a_row = 1;
    product.a_k = product.rows;
    product.b_k = kWidth<T>;
    for (int panel = 0; panel * kWidth<T> < depth; ++panel) {
      T* place = to + j * to_row + panel * kWidth<T>;
      const int count = imin(kWidth<T>, depth - panel * kWidth<T>);
      product.b = w.phi + static_cast<size_t>(panel) * rows * kWidth<T>;
      product.c = count == kWidth<T> ? place : w.edge;
      product.c_row = product.add_row = count == kWidth<T> ? to_row : kWidth<T>;
      product.add = first_block || count < kWidth<T> ? nullptr : place;
      multiply_group<T, 2, kRows>(product);
      for (int r = 0; count < kWidth<T> && r < product.rows; ++r)
        for (int i = 0; i < count; ++i)
          place[r * to_row + i] = w.edge[r * kWidth<T> + i] + (first_block ? T(0) : place[r * to_row + i]);
    }
  }
}

template <class X, class W>
void backward_range(const Params& p, const Cut& cut, int64_t begin, int64_t end, void* memory,
                    void* shared_memory) {
  using T = Compute<X>;
  constexpr int L = kLanes<T>;
  constexpr bool convert = !kSame<W, T>;
  const BackwardScratch<T> w(p, cut, convert, Scratch(memory));
  const Shared<T> shared(p, Scratch(shared_memory));
  Basis<T> basis;
  basis.prepare(p, w.tables);
  for (int64_t item = begin; item < end; ++item) {
    const int first = static_cast<int>(item) * cut.channels,
              channels = imin(cut.channels, p.channels - first);
    if (channels <= 0) continue;
    const int depth = channels * p.grids, panels = ceil_div(depth, kWidth<T>);
    const int64_t column = static_cast<int64_t>(first) * p.grids;
    for (int j = 0; p.wants_u() && j < p.outputs; ++j) {
      const W* from = row_of<const W>(p.weight, j) + column;
      for (int k = 0; k < depth; k += L) {
        T* to = w.weight + (static_cast<size_t>(k / kWidth<T>) * p.outputs + j) * kWidth<T> + k % kWidth<T>;
        store(to, k + L <= depth ? load(from + k) : load_first(from + k, depth - k));
      }
      for (int k = round_up_lanes<T>(depth); k < panels * kWidth<T>; ++k)
        w.weight[(static_cast<size_t>(panels - 1) * p.outputs + j) * kWidth<T> + k % kWidth<T>] = 0;
    }
    for (int i = 0; i < 2 * round_up_lanes<T>(channels); ++i) w.norm_grads[i] = 0;
    for (int k = 0; p.grad_grid && k < depth + 2 * L; ++k) w.grid_grads[k] = 0;

    T* to = w.grad_weight;
    int64_t to_row = w.width;
    if constexpr (!convert) {
      to = static_cast<T*>(p.grad_weight.data) + column;
      to_row = p.grad_weight.stride[0];
    }
    const int64_t blocks = (p.rows + kBlock - 1) / kBlock;
    int rows = 0;
    for (int64_t block = 0, start = 0; block < blocks; ++block, start += rows) {
      rows = static_cast<int>((p.rows - start + blocks - block - 1) / (blocks - block));
      if (p.wants_u()) multiply_weight<W>(p, w, start, rows, panels);
      if (basis.compact)
        contract<true, X>(p, basis, w, shared, start, rows, first, channels);
      else
        contract<false, X>(p, basis, w, shared, start, rows, first, channels);
      if (p.grad_weight) add_weight_gradient<W>(p, w, start, rows, block == 0, to, to_row, depth);
    }

    for (int j = 0; convert && p.grad_weight && j < p.outputs; ++j) {
      W* row = row_of<W>(p.grad_weight, j) + column;
      for (int k = 0; k < depth; k += L) {
        const Vec<T> value = load(w.grad_weight + static_cast<size_t>(j) * w.width + k);
        k + L <= depth ? store(row + k, value) : store_first(row + k, value, depth - k);
      }
    }
    for (int c = 0; c < channels; ++c) {
      if (p.grad_ln_weight) static_cast<T*>(p.grad_ln_weight.data)[first + c] = w.norm_grads[c];
      if (p.grad_ln_bias)
        static_cast<T*>(p.grad_ln_bias.data)[first + c] = w.norm_grads[round_up_lanes<T>(channels) + c];
    }
    for (int k = 0; p.grad_grid && k < depth; ++k) shared.grad_grid[column + k] = w.grid_grads[k];
  }
}

// dx of each row from its du: dx = rstd * (w - mean(w) - normed * mean(w * normed)) with w = du * gamma.
template <class X>
void norm_backward(const Params& p, int64_t begin, int64_t end, void* memory) {
  using T = Compute<X>;
  constexpr int L = kLanes<T>;
  const Shared<T> shared(p, Scratch(memory));
  const int n = p.channels;
  const T* gamma = static_cast<const T*>(p.ln_weight.data);
  const auto part = [](const auto* from, int c, int count) {
    return count == L ? load(from + c) : load_first(from + c, count);
  };
  for (int64_t row = begin; row < end; ++row) {
    const X* x = row_of<const X>(p.x, row);
    const T* grad_u = shared.grad_u + row * n;
    X* to = row_of<X>(p.grad_x, row);
    const T mean = static_cast<const T*>(p.mean.data)[row], rstd = static_cast<const T*>(p.rstd.data)[row];
    Vec<T> sum{}, projection{};
    for (int c = 0; c < n; c += L) {
      const int count = imin(L, n - c);
      const Vec<T> scaled = part(grad_u, c, count) * part(gamma, c, count);
      sum += scaled;
      projection += scaled * ((part(x, c, count) - mean) * rstd);
    }
    const T a = across<T>(sum) / n, b = across<T>(projection) / n;
    for (int c = 0; c < n; c += L) {
      const int count = imin(L, n - c);
      const Vec<T> normed = (part(x, c, count) - mean) * rstd;
      const Vec<T> result = (part(grad_u, c, count) * part(gamma, c, count) - a - normed * b) * rstd;
      count == L ? store(to + c, result) : store_first(to + c, result, count);
    }
  }
}

template <class T>
void sum_grid(const Params& p, void* memory) {
  const Shared<T> shared(p, Scratch(memory));
  for (int m = 0; m < p.grids; ++m) {
    T sum = 0;
    for (int64_t c = 0; c < p.channels; ++c) sum += shared.grad_grid[c * p.grids + m];
    static_cast<T*>(p.grad_grid.data)[m] = sum * static_cast<T>(-8 * p.inv_denominator);
  }
}

}  // namespace vitkernels::kan_linear::VITKERNELS_ISA
