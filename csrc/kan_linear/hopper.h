// The kernels for Hopper: products of warpgroups, for 16-bit weights and eight grid points.
#pragma once
#include "tiles.h"
#include "vitkernels/wgmma.h"

namespace vitkernels::kan_linear {

// A stage of a product: the columns of Phi of SLICE channels, 128 bytes of a row.
constexpr int SLICE = 8, STAGE_BYTES = 128;
// Norm parameters, as floats, lie in shared memory beside the tiles.
constexpr int HOPPER_CHANNELS = 2048;
// Within a tile, places in x and W are 32-bit numbers.
constexpr int64_t HOPPER_ROW = int64_t{1} << 22;

template <class X, class T>
bool fits_hopper(const Problem<X, T>& p) {
  if constexpr (Config<T>::HALF) {
    const auto aligned = [](const void* data, int64_t stride, size_t size, size_t bytes) {
      return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
             stride * static_cast<int64_t>(size) % static_cast<int64_t>(bytes) == 0;
    };
    return p.grids == CENTRES && p.channels % SLICE == 0 && p.channels <= HOPPER_CHANNELS &&
           p.x_row <= HOPPER_ROW && p.weight_row <= HOPPER_ROW &&
           aligned(p.x, p.x_row, sizeof(X), 4 * sizeof(X)) &&
           aligned(p.weight, p.weight_row, sizeof(T), 16) && wgmma_available();
  }
  return false;
}

// y = Phi W^T. `p.mean` and `p.rstd` are ready.
template <class X, class T>
void launch_hopper_forward(const Problem<X, T>& p, T* y, int64_t y_row, Stream stream);

}  // namespace vitkernels::kan_linear
