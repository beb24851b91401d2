// What the mask is divided by, and where a launch finds it.
//
// Half precision has enough of the divisors that the forward returns: sums, or logarithms of sums of
// exponentials. The latter err by half a unit of their last place, which in float and double is more than a
// softmax may err by: there the products read a maximum and a sum, made anew into the workspace.
#pragma once
#include "tiles.h"

namespace vitkernels::learnable_token_merge {

inline bool by_softmax(const Params& p) {
  return p.normalize == Normalize::softmax || p.normalize == Normalize::softmax_rows;
}
inline bool by_rows(const Params& p) {
  return p.normalize == Normalize::softmax_rows;
}
inline bool exact_norms(const Params& p) {
  return by_softmax(p) && (p.dtype == DType::f32 || p.dtype == DType::f64);
}
inline int64_t accumulator_bytes(const Params& p) {
  return p.dtype == DType::f64 ? 8 : 4;
}
inline bool shared_mask(const Params& p) {
  return p.g.stride[0] == 0;
}

// Maxima, then sums, [masks][rows or columns] each.
inline int64_t norms(const Params& p) {
  return (shared_mask(p) ? 1 : p.batch) * (by_rows(p) ? p.tokens : p.merged_tokens);
}
inline int64_t norms_bytes(const Params& p) {
  return exact_norms(p) ? (2 * norms(p) * accumulator_bytes(p) + 15) / 16 * 16 : 0;
}

// Fills those of params.divisors and of the maxima and sums in `workspace` that are wanted.
void find_norms(const Params& params, bool divisors, void* workspace, Stream stream);

inline void check_sizes(const Params& p) {
  constexpr int64_t MOST = 0x7fffff00;
  if (p.tokens > MOST || p.merged_tokens > MOST || p.width > MOST || p.other_width > MOST || p.batch > MOST)
    throw std::runtime_error("learnable token merge: every size must be below 2^31 - 256");
}

template <class T, class M>
Mask<T, M> make_mask(const Params& p, void* workspace) {
  using Acc = accumulate_t<T>;
  Mask<T, M> mask;
  mask.g = static_cast<const M*>(p.g.data);
  mask.batch_stride = p.g.stride[0];
  mask.row_stride = p.g.stride[1];
  mask.tokens = static_cast<int>(p.tokens);
  mask.merged = static_cast<int>(p.merged_tokens);
  mask.pairs = reinterpret_cast<uintptr_t>(mask.g) % (2 * sizeof(M)) == 0 && mask.batch_stride % 2 == 0 &&
               mask.row_stride % 2 == 0;
  mask.by_rows = by_rows(p);
  mask.shift = mask.divisor = nullptr;
  mask.norm_stride = p.divisors.stride[0];
  if (exact_norms(p)) {
    mask.shift = static_cast<const Acc*>(workspace);
    mask.divisor = mask.shift + norms(p);
    mask.norm_stride = shared_mask(p) ? 0 : by_rows(p) ? p.tokens : p.merged_tokens;
  } else if (by_softmax(p)) {
    mask.shift = static_cast<const Acc*>(p.divisors.data);
  } else if (p.normalize == Normalize::sum) {
    mask.divisor = static_cast<const Acc*>(p.divisors.data);
  }
  return mask;
}

}  // namespace vitkernels::learnable_token_merge
