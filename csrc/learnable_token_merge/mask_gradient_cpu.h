// The gradient of the mask on the CPU: z dy^T summed over chunks of the batch, then the way back through the
// normalisation.
#pragma once
#include "product_cpu.h"

namespace vitkernels::learnable_token_merge {
namespace VITKERNELS_ISA {
namespace {

constexpr int kMaxChunks = 16;                     // of the batch, for a shared mask
constexpr int64_t kSumsBytes = int64_t{16} << 20;  // of all chunks, unless one needs more
constexpr int kDepthSlice = 256;                   // channels packed at a time
constexpr int kChainVecs = 8, kChainRows = 16;     // of an item of the way back

// Chunks do not depend on the number of threads, so that sums have one order.
template <class T>
struct Chunks {
  int64_t count;
  int pitch;
  size_t size;  // elements of a chunk's sums
  int64_t batch;

  explicit Chunks(const Params& p)
      : pitch(round_up_lanes<T>(static_cast<int>(p.merged_tokens))),
        size(static_cast<size_t>(p.tokens) * pitch),
        batch(p.batch) {
    if (p.g.stride[0] != 0) {
      count = batch;
      return;
    }
    const int64_t fit = kSumsBytes / static_cast<int64_t>(size * sizeof(T));
    count = fit < 1 ? 1 : fit < kMaxChunks ? fit : kMaxChunks;
    if (count > batch) count = batch;
  }
  int64_t begin(int64_t chunk) const { return batch * chunk / count; }
};

template <class T>
struct SumsScratch {
  T *panels, *left;
  size_t size;
  SumsScratch(const Params& p, Scratch scratch) {
    panels = scratch.take<T>(static_cast<size_t>(kDepthSlice) * kGroupVecs * kLanes<T>);
    // Rows of z in the compute type, where they are not.
    left = scratch.take<T>(p.dtype == DType::f16 || p.dtype == DType::bf16 ? p.tokens * kDepthSlice : 0);
    size = scratch.used;
  }
};

// sums[token][merged token] of an operand's z dy^T for one image, added unless it is the `first`.
template <class E, class T>
void add_products(const Params& p, const SumsScratch<T>& w, const View& z, const View& grad, int64_t width,
                  int64_t b, const Panels<T>& panels, int group, T* sums, int pitch, bool first) {
  constexpr int L = kLanes<T>;
  const int tokens = static_cast<int>(p.tokens);
  const int begin = panels.panel(group), end = panels.panel(group + 1);
  const E* rows = static_cast<const E*>(z.data) + b * z.stride[0];
  const E* columns = static_cast<const E*>(grad.data) + b * grad.stride[0];
  const int all = static_cast<int>(width), slices = ceil_div(all, kDepthSlice);
  for (int s = 0, k = 0, depth; s < slices; ++s, k += depth) {
    depth = ceil_div(all - k, slices - s);
    Product<T> product{tokens, depth, nullptr, 0, 1, nullptr, 0, nullptr, pitch, nullptr, pitch};
    if constexpr (kSame<E, T>) {
      product.a = rows + k;
      product.a_row = z.stride[1];
    } else {
      pack(w.left, kDepthSlice, rows + k, z.stride[1], 1, tokens, depth, T(1));
      product.a = w.left;
      product.a_row = kDepthSlice;
    }
    T* packed = w.panels;
    for (int panel = begin; panel < end; ++panel) {
      const int lane = panels.vec(panel) * L, vecs = panels.vec(panel + 1) - panels.vec(panel);
      const int lanes = imin(vecs * L, panels.lanes - lane);
      pack(packed, vecs * L, columns + k + lane * grad.stride[1], 1, grad.stride[1], depth, lanes, T(1));
      product.b = packed;
      product.b_k = vecs * L;
      product.c = sums + lane;
      product.add = first && s == 0 ? nullptr : product.c;
      multiply_panel<T>(vecs, product, false);
      packed += static_cast<ptrdiff_t>(depth) * vecs * L;
    }
  }
}

template <class E>
void sums_range(const Params& p, int64_t begin, int64_t end, void* memory, void* shared) {
  using T = Compute<E>;
  const SumsScratch<T> w(p, Scratch(memory));
  const Chunks<T> chunks(p);
  const Panels<T> panels(p.merged_tokens);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item / panels.groups;
    const int group = static_cast<int>(item % panels.groups);
    T* sums = static_cast<T*>(shared) + chunk * chunks.size;
    bool first = true;
    for (int64_t b = chunks.begin(chunk); b < chunks.begin(chunk + 1); ++b) {
      if (p.grad_y && p.width) {
        add_products<E, T>(p, w, p.z, p.grad_y, p.width, b, panels, group, sums, chunks.pitch, first);
        first = false;
      }
      if (p.other && p.grad_y_other && p.other_width) {
        add_products<E, T>(p, w, p.other, p.grad_y_other, p.other_width, b, panels, group, sums, chunks.pitch,
                           first);
        first = false;
      }
    }
    const int left = panels.vec(panels.panel(group)) * kLanes<T>,
              right = panels.vec(panels.panel(group + 1)) * kLanes<T>;
    for (int n = 0; first && n < p.tokens; ++n)
      for (int i = left; i < right; ++i) sums[static_cast<ptrdiff_t>(n) * chunks.pitch + i] = 0;
  }
}

// ---- the way back

// sums[0] <- the sum over all chunks, for one vector.
template <class T>
VITKERNELS_INLINE Vec<T> total(T* sums, const Chunks<T>& chunks, bool shared_mask, ptrdiff_t at) {
  Vec<T> sum = load(sums + at);
  for (int64_t c = 1; shared_mask && c < chunks.count; ++c) sum += load(sums + c * chunks.size + at);
  return sum;
}

template <class T>
struct ChainScratch {
  T *numbers, *weights;  // of a piece: five arrays, and [token][lane] or one row
  size_t size;
  ChainScratch(const Params& p, Scratch scratch) {
    const size_t lanes = kChainVecs * kLanes<T>, pitch = round_up_lanes<T>(static_cast<int>(p.merged_tokens));
    numbers = scratch.take<T>(5 * lanes);
    weights = scratch.take<T>(p.tokens * lanes > pitch ? p.tokens * lanes : pitch);
    size = scratch.used;
  }
};

// The gradient of columns [first, first + vecs * L), for a mask that its columns divide.
template <class M, class T>
void chain_columns(const Mask<M, T>& mask, const Chunks<T>& chunks, bool shared_mask,
                   const ChainScratch<T>& w, T* sums, M* to, ptrdiff_t row, int first, int vecs) {
  constexpr int L = kLanes<T>, pitch = kChainVecs * L;
  T *tops = w.numbers, *divisors = tops + pitch, *run = divisors + pitch, *means = run + pitch;
  mask.template divide_columns<T>(first, vecs, tops, divisors, run, w.weights, pitch, [](int, const T*) {});
  ColumnSums<T> all(run, means, vecs);
  for (int n = 0; n < mask.tokens; ++n) {
    for (int i = 0; i < vecs * L; i += L) {
      const ptrdiff_t at = static_cast<ptrdiff_t>(n) * chunks.pitch + first + i;
      const Vec<T> grad = total(sums, chunks, shared_mask, at);
      store(sums + at, grad);
      all.add(i, grad * load(w.weights + n * pitch + i));
    }
    all.end_row(n + 1 == mask.tokens);
  }
  const bool is_sum = mask.kind == Normalize::sum;
  for (int i = 0; is_sum && i < vecs * L; i += L)  // a sum of 0 divides nothing
    store(means + i, load(tops + i) == T(0) ? Vec<T>{} : load(means + i));
  for (int n = 0; n < mask.tokens; ++n, to += row)
    for (int i = 0; i < vecs * L; i += L) {
      const Vec<T> grad = load(sums + static_cast<ptrdiff_t>(n) * chunks.pitch + first + i) - load(means + i);
      store_some<M, T>(to + first + i,
                       is_sum ? grad / load(divisors + i) : grad * load(w.weights + n * pitch + i),
                       mask.merged - first - i);
    }
}

// The gradient of one row, for a mask that its rows divide or nothing.
template <class M, class T>
void chain_row(const Mask<M, T>& mask, const Chunks<T>& chunks, bool shared_mask, const ChainScratch<T>& w,
               T* sums, M* to, int token) {
  constexpr int L = kLanes<T>;
  const ptrdiff_t row = static_cast<ptrdiff_t>(token) * chunks.pitch;
  const bool softmax = mask.kind == Normalize::softmax_rows;
  if (softmax) mask.template divide_row<T>(token, w.weights);
  Vec<T> sum = {};
  for (int i = 0; i < mask.merged; i += L) {
    const Vec<T> grad = total(sums, chunks, shared_mask, row + i);
    if (!softmax) {
      store_some<M, T>(to + i, grad, mask.merged - i);
      continue;
    }
    store(sums + row + i, grad);
    sum += grad * load(w.weights + i);  // of no column: a weight of 0
  }
  if (!softmax) return;
  const T mean = across<T>(sum);
  for (int i = 0; i < mask.merged; i += L)
    store_some<M, T>(to + i, (load(sums + row + i) - mean) * load(w.weights + i), mask.merged - i);
}

int chain_pieces(const Params& p, int lanes) {
  const bool columns = p.normalize == Normalize::sum || p.normalize == Normalize::softmax;
  return columns ? ceil_div(static_cast<int>(p.merged_tokens), kChainVecs * lanes)
                 : ceil_div(static_cast<int>(p.tokens), kChainRows);
}

template <class E, class M>
void chain_range(const Params& p, int64_t begin, int64_t end, void* memory, void* shared) {
  using T = Compute<E>;
  const ChainScratch<T> w(p, Scratch(memory));
  const bool shared_mask = p.g.stride[0] == 0;
  const Chunks<T> chunks(p);
  const int pieces = chain_pieces(p, kLanes<T>);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / pieces;
    const int piece = static_cast<int>(item % pieces);
    const Mask<M, T> mask(p, b);
    T* sums = static_cast<T*>(shared) + b * chunks.size;
    M* to = static_cast<M*>(p.grad_g.data) + b * p.grad_g.stride[0];
    if (mask.by_columns()) {
      const int first = piece * kChainVecs * kLanes<T>;
      const int vecs = imin(kChainVecs, ceil_div(mask.merged - first, kLanes<T>));
      chain_columns<M, T>(mask, chunks, shared_mask, w, sums, to, p.grad_g.stride[1], first, vecs);
    } else {
      for (int n = piece * kChainRows; n < imin(mask.tokens, (piece + 1) * kChainRows); ++n)
        chain_row<M, T>(mask, chunks, shared_mask, w, sums, to + n * p.grad_g.stride[1], n);
    }
  }
}

// ---- by dtype

template <class T>
int64_t sums_items_as(const Params& p) {
  return Chunks<T>(p).count * Panels<T>(p.merged_tokens).groups;
}
int64_t sums_items(const Params& p) {
  return p.dtype == DType::f64 ? sums_items_as<double>(p) : sums_items_as<float>(p);
}
size_t sums_scratch(const Params& p) {
  return p.dtype == DType::f64 ? SumsScratch<double>(p, Scratch(nullptr)).size
                               : SumsScratch<float>(p, Scratch(nullptr)).size;
}
template <class T>
size_t shared_as(const Params& p) {
  const Chunks<T> chunks(p);
  return chunks.count * chunks.size * sizeof(T);
}
size_t shared_size(const Params& p) {
  return p.dtype == DType::f64 ? shared_as<double>(p) : shared_as<float>(p);
}
void sums(const Params& p, int64_t begin, int64_t end, void* scratch, void* shared) {
  with_dtypes(p.dtype, p.mask_dtype,
              [&](auto e, auto) { sums_range<decltype(e)>(p, begin, end, scratch, shared); });
}

int64_t chain_items(const Params& p) {
  return (p.g.stride[0] ? p.batch : 1) *
         chain_pieces(p, p.dtype == DType::f64 ? kLanes<double> : kLanes<float>);
}
size_t chain_scratch(const Params& p) {
  return p.dtype == DType::f64 ? ChainScratch<double>(p, Scratch(nullptr)).size
                               : ChainScratch<float>(p, Scratch(nullptr)).size;
}
void chain(const Params& p, int64_t begin, int64_t end, void* scratch, void* shared) {
  with_dtypes(p.dtype, p.mask_dtype,
              [&](auto e, auto m) { chain_range<decltype(e), decltype(m)>(p, begin, end, scratch, shared); });
}

}  // namespace
}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::learnable_token_merge
