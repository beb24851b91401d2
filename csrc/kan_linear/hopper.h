// The kernels for Hopper: products of warpgroups, for 16-bit weights and eight grid points.
#pragma once
#include "tiles.h"
#include "vitkernels/matrix_copy.h"

namespace vitkernels::kan_linear {

// A stage of a product: the columns of Phi of SLICE channels, 128 bytes of a row.
constexpr int SLICE = 8, STAGE_BYTES = 128;
// Norm parameters, as floats, lie in shared memory beside the tiles.
constexpr int HOPPER_CHANNELS = 2048;
// Within a tile, places in x and W are 32-bit numbers.
constexpr int64_t HOPPER_ROW = int64_t{1} << 22;

inline bool aligned(const void* data, int64_t stride, size_t element, size_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
         stride * static_cast<int64_t>(element) % static_cast<int64_t>(bytes) == 0;
}

template <class X, class T>
bool fits_hopper(const Problem<X, T>& p) {
  if constexpr (Config<T>::HALF) {
    return p.grids == CENTRES && p.channels % SLICE == 0 && p.channels <= HOPPER_CHANNELS &&
           p.x_row <= HOPPER_ROW && p.weight_row <= HOPPER_ROW &&
           aligned(p.x, p.x_row, sizeof(X), 4 * sizeof(X)) &&
           takes_matrix(p.weight, p.depth(), p.weight_row) && wgmma_available();
  }
  return false;
}

// Half a slice of a row of x, in registers.
template <class X>
using FourOf = Vec<uint32_t, sizeof(X)>;
template <class X>
VK_DEVICE FourOf<X> load_four(const X* x) {
  return FourOf<X>::load(reinterpret_cast<const uint32_t*>(x));
}

// The norm of four channels, as exponents: of (x rstd + centre) factor + term.
struct FourNorms {
  Vec<float, 4> factor, term;
};

template <class X>
VK_DEVICE Vec<float, 4> exponents_of(const FourOf<X>& words, float rstd, float centre,
                                     const FourNorms& norms) {
  Vec<X, 4> values;
  memcpy(static_cast<void*>(&values), &words, sizeof(values));
  Vec<float, 4> exponents;
  VK_UNROLL
  for (int c = 0; c < 4; ++c)
    exponents[c] = (to_float(values[c]) * rstd + centre) * norms.factor[c] + norms.term[c];
  return exponents;
}

// What phi at the centres is made of: e^(2 u / h) where the grid is narrow, else its exponent of two.
template <class X>
VK_DEVICE Vec<float, 4> decays_of(const FourOf<X>& words, float rstd, float centre, const FourNorms& norms,
                                  bool narrow) {
  auto decays = exponents_of<X>(words, rstd, centre, norms);
  if (narrow) {
    VK_UNROLL
    for (int c = 0; c < 4; ++c) decays[c] = exp2_fast(at_most(decays[c], WIDEST_U));
  }
  return decays;
}

// A quarter of Phi of half a slice, each channel to place(0 to 3).
template <class T, class Place>
VK_DEVICE void make_four(const Vec<float, 4>& decays, const Centres& centres, bool narrow,
                         const Place& place) {
  if (narrow) {
    VK_UNROLL
    for (int c = 0; c < 4; ++c) quarter_phi_of<T>(decays[c], centres).store(place(c));
  } else {
    VK_UNROLL
    for (int c = 0; c < 4; ++c) wide_quarter_phi<T>(decays[c], centres).store(place(c));
  }
}

// y = Phi W^T, right after the launch that makes `p.mean` and `p.rstd`.
template <class X, class T>
void launch_hopper_forward(const Problem<X, T>& p, T* y, int64_t y_row, Stream stream);

// The gradient of u, of [rows][I] or null, and partial sums [tiles of U_ROWS rows][I] for those of the norm's
// parameters. Not that of the grid.
constexpr int U_ROWS = 192;
template <class X, class T>
bool fits_hopper_gradient(const Problem<X, T>& p) {
  return fits_hopper(p) && p.outputs % 8 == 0 && p.grad_row <= HOPPER_ROW &&
         takes_matrix(p.grad_y, p.outputs, p.grad_row);
}
template <class X, class T>
void launch_hopper_u(const Problem<X, T>& p, float* grad_u, float* scale, float* shift, Stream stream);

// dW = dY^T Phi, over shares of the rows: partials [shares][J][I * G], or dW itself when there is one share.
struct WeightShares {
  int64_t share, shares;  // rows of a share, a multiple of a stage's; how many
  WeightShares(int64_t rows, int channels, int outputs);
};
template <class X, class T, class R>
void launch_hopper_weight(const Problem<X, T>& p, const WeightShares& shares, R* result, int64_t result_row,
                          int64_t result_share, Stream stream);

}  // namespace vitkernels::kan_linear
