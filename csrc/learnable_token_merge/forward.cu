// Forward: the divisors in a first pass over the mask, which is small beside the tokens, then the product.
//
// Floor: batch (N (D + D') + P (D + D') + N P) sizeof(T) bytes, once each, which bind (197 x 768 tokens to
// 158: 79 FLOPs a byte in 16 bits), and 2 batch N P (D + D') FLOPs. From L2 come the tokens once for every 64
// merged ones, and the mask once for every 128 channels: half as many bytes again at these sizes as from
// memory. Expected: 1.5 times the floor.
#include "merge.h"
#include "norms.h"
#include "strips.h"

namespace vitkernels::learnable_token_merge {
namespace {

template <class Acc>
struct Norms {
  Acc *divisors, *maxima, *sums;  // [masks][count]; the last two for a softmax; each may be absent
  int64_t divisors_stride, count;

  VK_DEVICE void write(int64_t mask, int index, Acc maximum, Acc sum, bool softmax) const {
    if (divisors != nullptr)
      divisors[mask * divisors_stride + index] = softmax ? maximum + log_(sum) : sum == Acc(0) ? Acc(1) : sum;
    if (maxima != nullptr) maxima[mask * count + index] = maximum;
    if (sums != nullptr) sums[mask * count + index] = sum;
  }
};

template <class Acc, class M>
VK_KERNEL void VK_LAUNCH_BOUNDS(STRIP_THREADS, 1)
    columns_kernel(const M* g, int64_t batch_stride, int64_t row_stride, int rows, int columns, int strips,
                   bool softmax, Norms<Acc> norms) {
  Acc* scratch = reinterpret_cast<Acc*>(shared_memory());
  const int64_t mask = block_x() / strips;
  const int column = static_cast<int>(block_x() % strips) * 32 + lane_id();
  const M* from = column < columns ? g + mask * batch_stride + column : nullptr;
  if (!softmax) {
    const Acc sum = column_sum<Acc>(from, row_stride, rows, scratch);
    if (warp_id() == 0 && from != nullptr) norms.write(mask, column, Acc(0), sum, false);
    return;
  }
  Acc maximum = -INFINITY, sum = Acc(0);
  if (from != nullptr) {
    VK_UNROLL_4
    for (int row = warp_id(); row < rows; row += STRIP_WARPS) {
      const Acc value = to_accumulate(from[row * row_stride]);
      maximum = value > maximum ? value : maximum;
    }
  }
  maximum = over_warps<true>(maximum, scratch);
  if (from != nullptr) {
    VK_UNROLL_4
    for (int row = warp_id(); row < rows; row += STRIP_WARPS)
      sum += exp_(to_accumulate(from[row * row_stride]) - maximum);
  }
  sum = over_warps<false>(sum, scratch);
  if (warp_id() == 0 && from != nullptr) norms.write(mask, column, maximum, sum, true);
}

// Always a softmax.
template <class Acc, class M>
VK_KERNEL void VK_LAUNCH_BOUNDS(STRIP_THREADS, 1)
    rows_kernel(const M* g, int64_t batch_stride, int64_t row_stride, int rows, int columns, int64_t all_rows,
                Norms<Acc> norms) {
  const int64_t index = static_cast<int64_t>(block_x()) * STRIP_WARPS + warp_id();
  if (index >= all_rows) return;
  const int64_t mask = index / rows;
  const int row = static_cast<int>(index - mask * rows);
  const M* from = g + mask * batch_stride + row * row_stride;
  Acc maximum = -INFINITY, sum = Acc(0);
  VK_NO_UNROLL
  for (int column = lane_id(); column < columns; column += 32) {
    const Acc value = to_accumulate(from[column]);
    maximum = value > maximum ? value : maximum;
  }
  maximum = warp_max(maximum);
  VK_NO_UNROLL
  for (int column = lane_id(); column < columns; column += 32)
    sum += exp_(to_accumulate(from[column]) - maximum);
  sum = warp_sum(sum);
  if (lane_id() == 0) norms.write(mask, row, maximum, sum, true);
}

// How many masks need norms: those whose divisors are wanted, whatever the mask's own stride.
int64_t masks(const Params& p, bool divisors) {
  return divisors ? (p.divisors.stride[0] == 0 ? 1 : p.batch) : (shared_mask(p) ? 1 : p.batch);
}

}  // namespace

void find_norms(const Params& p, bool divisors, void* workspace, Stream stream) {
  const int64_t many = masks(p, divisors);  // one of a shared mask even where the batch is empty
  if (p.normalize == Normalize::none || many == 0) return;
  with_dtypes(p.dtype, p.mask_dtype, [&](auto token, auto element) {
    using Acc = accumulate_t<decltype(token)>;
    using M = decltype(element);
    const int rows = static_cast<int>(p.tokens), columns = static_cast<int>(p.merged_tokens);
    const int64_t count = by_rows(p) ? rows : columns;
    Norms<Acc> found{divisors ? static_cast<Acc*>(p.divisors.data) : nullptr, nullptr, nullptr,
                     p.divisors.stride[0], shared_mask(p) ? 0 : count};
    if (exact_norms(p)) {
      found.maxima = static_cast<Acc*>(workspace);
      found.sums = found.maxima + norms(p);
    }
    const M* g = static_cast<const M*>(p.g.data);
    if (by_rows(p)) {
      launch(rows_kernel<Acc, M>, Dim3{ceil_div(many * rows, STRIP_WARPS)}, STRIP_THREADS, 0, stream, g,
             p.g.stride[0], p.g.stride[1], rows, columns, many * rows, found);
    } else {
      const int strips = ceil_div(columns, 32);
      launch(columns_kernel<Acc, M>, Dim3{many * strips}, STRIP_THREADS, STRIP_BYTES<Acc>, stream, g,
             p.g.stride[0], p.g.stride[1], rows, columns, strips, by_softmax(p), found);
    }
  });
}

int64_t forward_workspace_cuda(const Params& p) {
  return norms_bytes(p);
}

void forward_cuda(const Params& p, Stream stream) {
  check_sizes(p);
  find_norms(p, true, p.workspace, stream);
  with_dtypes(p.dtype, p.mask_dtype, [&](auto token, auto element) {
    using T = decltype(token);
    using M = decltype(element);
    const Operand<T> first{{p.z, p.width}, {p.y, p.width}};
    const Operand<T> second{{p.other, p.other_width}, {p.y_other, p.other_width}};
    launch_merge<true, T, M>(make_mask<T, M>(p, p.workspace), first, second, p.batch, stream);
  });
}

}  // namespace vitkernels::learnable_token_merge
