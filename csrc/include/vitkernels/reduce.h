// Reductions over a warp and a block; every thread receives the result. Included through device.h.
#pragma once

namespace vitkernels {

// Over groups of `width` neighbouring lanes (a power of two); the order of the sum is fixed.
template <int width = 32, typename T>
VK_DEVICE T warp_sum(T value) {
  VK_UNROLL
  for (int mask = width / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}

template <int width = 32, typename T>
VK_DEVICE T warp_max(T value) {
  VK_UNROLL
  for (int mask = width / 2; mask > 0; mask /= 2) {
    const T other = shfl_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// `scratch` is shared memory for one value per warp, free for reuse on return. Whole warps only.
template <typename T>
VK_DEVICE T block_sum(T value, T* scratch) {
  value = warp_sum(value);
  if (lane_id() == 0) scratch[warp_id()] = value;
  sync_block();
  T total = scratch[0];
  for (int warp = 1; warp < block_dim_x() / 32; ++warp) total += scratch[warp];
  sync_block();
  return total;
}

template <typename T>
VK_DEVICE T block_max(T value, T* scratch) {
  value = warp_max(value);
  if (lane_id() == 0) scratch[warp_id()] = value;
  sync_block();
  T total = scratch[0];
  for (int warp = 1; warp < block_dim_x() / 32; ++warp) total = scratch[warp] > total ? scratch[warp] : total;
  sync_block();
  return total;
}

}  // namespace vitkernels
