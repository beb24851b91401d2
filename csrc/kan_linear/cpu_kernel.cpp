// The FasterKAN layer on one core, one instruction set.
//
// Floor: forward 2 N I G J FLOPs, backward twice that, at two FMAs a cycle; the basis takes one exponential
// and G divisions a channel of a row, hidden nowhere but small beside J >= 128 FMAs for each. x, y and their
// gradients cross memory a few times, the weight once for each block of rows (forward) or once (backward).
//
// Forward, for a block of rows: Phi is made for a few channels at a time, rows in the lanes, into panels that
// stay in L2; the weight is read in place, one broadcast scalar at a time. Backward, for a slice of channels:
// dY W of a block of rows is contracted with phi' where it lies in L2, and the same pass leaves Phi for dW.
#include "cpu_kernel.h"

#include "backward_cpu.h"

namespace vitkernels::kan_linear {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

namespace {

template <class T>
int row_width(const Cut& cut) {
  return ceil_div(cut.rows, kWidth<T>) * kWidth<T>;
}
int forward_channels(const Params& p) {
  const int channels = kDepth / p.grids;
  return channels < 1 ? 1 : channels < p.channels ? channels : p.channels;
}
int segment_outputs(const Params& p, const Cut& cut) {
  return ceil_div(p.outputs, cut.segments);
}

Cut cut(const Params& p, int threads) {
  Cut c;
  c.row_blocks = (p.rows + kBlock - 1) / kBlock;
  c.row_blocks = (c.row_blocks + threads - 1) / threads * threads;
  c.rows = static_cast<int>((p.rows + c.row_blocks - 1) / c.row_blocks);
  c.segments = 1;
  if (threads > 1 && c.rows < kBlock / 2) {
    // Few rows: thin blocks would leave lanes empty and read the weight too often, so outputs are shared out.
    const int64_t whole = (p.rows + kBlock - 1) / kBlock;
    c.segments = ceil_div(threads, static_cast<int>(whole));
    const int most = ceil_div(p.outputs, 2 * kRows);
    c.segments = imin(c.segments, most);
    c.row_blocks = whole;
    c.rows = static_cast<int>((p.rows + whole - 1) / whole);
  }
  c.rows = ceil_div(c.rows, kLanes<float>) * kLanes<float>;
  c.row_blocks = (p.rows + c.rows - 1) / c.rows;
  const int most = ceil_div(kSlice, p.grids);
  int items = ceil_div(p.channels, most);
  items = ceil_div(items, threads) * threads;
  c.channels = ceil_div(p.channels, items);
  return c;
}

// ---- forward

template <class T>
struct ForwardScratch {
  T *tables, *mean, *rstd, *x, *phi, *weight, *sums, *ones;
  size_t size;

  ForwardScratch(const Params& p, const Cut& cut, Scratch scratch) {
    const size_t width = row_width<T>(cut), channels = forward_channels(p), depth = channels * p.grids;
    tables = scratch.take<T>(Basis<T>::size(p.grids));
    mean = scratch.take<T>(width);
    rstd = scratch.take<T>(width);
    x = scratch.take<T>(channels * width);
    phi = scratch.take<T>(depth * width);
    weight = scratch.take<T>(kNarrowRows * (depth + kLanes<T>));
    sums = scratch.take<T>(segment_outputs(p, cut) * width);
    ones = scratch.take<T>(width);
    size = scratch.used;
  }
};

// Panels [panel][c * G + m][rows in the lanes] of Phi for `channels` channels from `first` on; x holds
// theirs, transposed. The last panel may be of one vector.
template <bool Compact, class T>
void make_panels(const Params& p, const Basis<T>& basis, const ForwardScratch<T>& w, int width, int vecs,
                 int first, int channels) {
  constexpr int L = kLanes<T>;
  const T* gamma = static_cast<const T*>(p.ln_weight.data) + first;
  const T* beta = static_cast<const T*>(p.ln_bias.data) + first;
  const int grids = p.grids, depth = channels * grids;
  for (int v = 0; v < vecs; ++v) {
    const int panel_vecs = imin(2, vecs - (v & ~1));
    T* panel = w.phi + static_cast<size_t>(v / 2) * depth * kWidth<T> + (v & 1) * L;
    const int step = panel_vecs * L;
    const Vec<T> mean = load(w.mean + v * L), rstd = load(w.rstd + v * L);
    for (int c = 0; c < channels; ++c) {
      const Vec<T> u =
          (load(w.x + static_cast<size_t>(c) * width + v * L) - mean) * rstd * gamma[c] + beta[c];
      Vec<T> up, down;
      basis.template enter<Compact>(u, up, down, basis);
      T* to = panel + static_cast<size_t>(c) * grids * step;
      for (int m = 0; m < grids; ++m) {
        Vec<T> quarter, tanh;
        basis.template at<Compact>(up, down, broadcast(basis.falling[m]), broadcast(basis.rising[m]), quarter,
                                   tanh, static_cast<T>(basis.inverse));
        store(to + m * step, T(4) * quarter);
      }
    }
  }
}

template <class X, class W>
void forward_range(const Params& p, const Cut& cut, int64_t begin, int64_t end, void* memory) {
  using T = Compute<X>;
  constexpr int L = kLanes<T>;
  const ForwardScratch<T> w(p, cut, Scratch(memory));
  Basis<T> basis;
  basis.prepare(p, w.tables);
  const int width = row_width<T>(cut), most = forward_channels(p), per_segment = segment_outputs(p, cut);
  for (int i = 0; i < width; ++i) w.ones[i] = 1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / cut.segments * cut.rows;
    const int segment = static_cast<int>(item % cut.segments);
    const int rows = static_cast<int>(p.rows - row < cut.rows ? p.rows - row : cut.rows);
    const int start = segment * per_segment, outputs = imin(per_segment, p.outputs - start);
    if (outputs <= 0) continue;
    for (int i = rows; i < width; ++i) w.mean[i] = w.rstd[i] = 0;
    row_statistics<X, T>(p, row, rows, w.mean, w.rstd);
    for (int i = 0; p.mean && segment == 0 && i < rows; ++i) {
      static_cast<T*>(p.mean.data)[row + i] = w.mean[i];
      static_cast<T*>(p.rstd.data)[row + i] = w.rstd[i];
    }
    const int vecs = ceil_div(rows, L), pairs = vecs / 2;
    for (int first = 0; first < p.channels; first += most) {
      const int channels = imin(most, p.channels - first), depth = channels * p.grids;
      pack(w.x, width, row_of<const X>(p.x, row) + first, 1, p.x.stride[0], channels, rows, T(1));
      if (basis.compact)
        make_panels<true>(p, basis, w, width, vecs, first, channels);
      else
        make_panels<false>(p, basis, w, width, vecs, first, channels);

      const int group_rows = vecs == 1 ? kNarrowRows : kRows;
      const int groups = ceil_div(outputs, group_rows);
      for (int g = 0, j = 0, count; g < groups; ++g, j += count) {
        count = ceil_div(outputs - j, groups - g);
        const W* weight = row_of<const W>(p.weight, start + j) + static_cast<int64_t>(first) * p.grids;
        // A chain of sums is at most kDepth long; of a channel with more grid points all are about equal.
        const int longest = ceil_div(depth, ceil_div(depth, kDepth));
        for (int k = 0; k < depth; k += longest) {
          const int run = imin(longest, depth - k);
          Product<T> product{};
          product.rows = count;
          product.depth = run;
          product.a_k = 1;
          if constexpr (kSame<W, T>) {
            product.a = weight + k;
            product.a_row = p.weight.stride[0];
          } else {
            const int row_size = depth + L;
            if (k == 0)
              for (int r = 0; r < count; ++r)
                convert_row(w.weight + static_cast<size_t>(r) * row_size, weight + r * p.weight.stride[0],
                            depth);
            product.a = w.weight + k;
            product.a_row = row_size;
          }
          product.c_row = product.add_row = width;
          T* sums = w.sums + static_cast<size_t>(j) * width;
          for (int panel = 0; panel < pairs; ++panel) {
            product.b = w.phi + (static_cast<size_t>(panel) * depth + k) * kWidth<T>;
            product.b_k = kWidth<T>;
            product.c = sums + panel * kWidth<T>;
            product.add = first || k ? product.c : nullptr;
            multiply_panel<T>(product);
          }
          if (vecs & 1) {
            product.b = w.phi + static_cast<size_t>(pairs) * depth * kWidth<T> + static_cast<size_t>(k) * L;
            product.b_k = L;
            product.c = sums + pairs * kWidth<T>;
            product.add = first || k ? product.c : nullptr;
            multiply_group<T, 1, kNarrowRows>(product);
          }
        }
      }
    }
    unpack(row_of<W>(p.y, row) + start, 1, p.y.stride[0], w.sums, width, outputs, rows, w.ones);
  }
}

// ---- by dtype

bool wide(const Params& p) {
  return p.x_dtype == DType::f64;
}
bool converts(const Params& p) {
  return p.weight_dtype == DType::f16 || p.weight_dtype == DType::bf16;
}

size_t forward_scratch(const Params& p, const Cut& cut) {
  return wide(p) ? ForwardScratch<double>(p, cut, Scratch(nullptr)).size
                 : ForwardScratch<float>(p, cut, Scratch(nullptr)).size;
}
void forward(const Params& p, const Cut& cut, int64_t begin, int64_t end, void* scratch) {
  with_dtypes(p.weight_dtype, p.x_dtype, [&](auto weight, auto x) {
    forward_range<decltype(x), decltype(weight)>(p, cut, begin, end, scratch);
  });
}
size_t shared_size(const Params& p) {
  return wide(p) ? Shared<double>(p, Scratch(nullptr)).size : Shared<float>(p, Scratch(nullptr)).size;
}
size_t backward_scratch(const Params& p, const Cut& cut) {
  return wide(p) ? BackwardScratch<double>(p, cut, false, Scratch(nullptr)).size
                 : BackwardScratch<float>(p, cut, converts(p), Scratch(nullptr)).size;
}
void backward(const Params& p, const Cut& cut, int64_t begin, int64_t end, void* scratch, void* shared) {
  with_dtypes(p.weight_dtype, p.x_dtype, [&](auto weight, auto x) {
    backward_range<decltype(x), decltype(weight)>(p, cut, begin, end, scratch, shared);
  });
}
void backward_rows(const Params& p, int64_t begin, int64_t end, void* shared) {
  with_dtype(p.x_dtype, [&](auto x) { norm_backward<decltype(x)>(p, begin, end, shared); });
}
void backward_grid(const Params& p, void* shared) {
  wide(p) ? sum_grid<double>(p, shared) : sum_grid<float>(p, shared);
}

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel = {cut,      forward_scratch, forward,      shared_size, backward_scratch,
                           backward, backward_rows,   backward_grid};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::kan_linear
