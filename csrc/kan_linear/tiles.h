// What the CUDA kernels of the FasterKAN layer share: tile sizes, the basis made into shared memory, tile
// loads.
//
// Products run on the engines of the tile-attention core: mma.m16n8k16 for f16 and bf16 weights, fused
// multiply-adds for f32 and f64. Phi never leaves shared memory: a tile of it is made from x while the
// product of the tile before runs.
#pragma once
#include "kan_linear.h"
#include "vitkernels/device.h"
#include "vitkernels/tile_attention_engine.h"

namespace vitkernels::kan_linear {

using tile_attention::clear;
using tile_attention::Engine;
using tile_attention::round_up;
using tile_attention::Span;
using tile_attention::store_pair;

// The most memory that partial weight gradients may take.
constexpr int64_t PARTIAL_BYTES = int64_t{64} << 20;

// T is the type of the weight.
template <class T>
struct Config {
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int WARPS = HALF ? 8 : 4, THREADS = 32 * WARPS;
  static constexpr int ROWS = 16 * WARPS;          // of y and du; also outputs of a tile of dW
  static constexpr int OUTPUTS = HALF ? 128 : 64;  // of a tile of y
  static constexpr int DEPTH = 64;                 // columns of Phi of a tile, so the most grid points
  static constexpr int PAD =
      static_cast<int>(16 / sizeof(T));  // keeps ldmatrix and vector loads free of conflicts
  static constexpr int LD = DEPTH + PAD;
  static constexpr int BUFFERS = sizeof(T) == 8 ? 1 : 2;  // within 99 KB of shared memory
  static constexpr int GRAD_DEPTH = HALF ? 64 : 32;       // outputs at a time in dPhi = dY W
  static constexpr int WEIGHT_ROWS = 32;                  // rows at a time in dW = dY^T Phi
  static constexpr int PHI_SCALE = HALF ? 4 : 1;          // Phi over what its tiles hold: quarter_phi()
};

// A vector in X or in f32, read as accumulate_t<X>: nothing casts it beforehand.
template <class X>
class Parameter {
 public:
  Parameter(const View& view, DType dtype)
      : data_(view.data), single_(dtype == DType::f32 && !std::is_same_v<X, float>) {}
  VK_DEVICE accumulate_t<X> operator[](int i) const {
    if (single_) return static_cast<const float*>(data_)[i];
    return to_accumulate(static_cast<const X*>(data_)[i]);
  }

 private:
  const void* data_;
  bool single_;
};

// X is the type of x, T of the weight.
template <class X, class T>
struct Problem {
  using Acc = accumulate_t<X>;

  int64_t rows, x_row, weight_row, grad_row;
  int channels, grids, outputs;
  int slice, width, padded,
      slices;  // channels of a tile of Phi, their columns, rounded up to 16; tiles in all
  const X* x;
  const T *weight, *grad_y;
  Parameter<X> ln_weight, ln_bias, grid;
  const Acc *mean, *rstd;
  Acc inverse;

  explicit Problem(const Params& p)
      : rows(p.rows),
        x_row(p.x.stride[0]),
        weight_row(p.weight.stride[0]),
        grad_row(p.grad_y.stride[0]),
        channels(p.channels),
        grids(p.grids),
        outputs(p.outputs),
        x(static_cast<const X*>(p.x.data)),
        weight(static_cast<const T*>(p.weight.data)),
        grad_y(static_cast<const T*>(p.grad_y.data)),
        ln_weight(p.ln_weight, p.ln_weight_dtype),
        ln_bias(p.ln_bias, p.ln_bias_dtype),
        grid(p.grid, p.grid_dtype),
        mean(static_cast<const Acc*>(p.mean.data)),
        rstd(static_cast<const Acc*>(p.rstd.data)),
        inverse(static_cast<Acc>(p.inv_denominator)) {
    if (grids > Config<T>::DEPTH) throw std::runtime_error("kan_linear: takes grids of up to 64 points");
    slice = Config<T>::DEPTH / grids;
    width = slice * grids;
    padded = round_up(width, 16);
    slices = (channels + slice - 1) / slice;
  }

  VK_HOST_DEVICE int64_t depth() const { return static_cast<int64_t>(channels) * grids; }
  // Columns of the weight that belong to a slice.
  VK_DEVICE int columns(int index) const {
    const int rest = channels - index * slice;
    return (rest < slice ? rest : slice) * grids;
  }
  VK_DEVICE Acc normed(int64_t row, int channel) const {
    return (to_accumulate(x[row * x_row + channel]) - mean[row]) * rstd[row];
  }
  // Of e^(2 u / h), h being the width of the basis: the exponent of two over u.
  VK_DEVICE float exponent_unit() const { return static_cast<float>(inverse) * (2.0f * LOG2E); }
  VK_DEVICE Acc u(Acc normed, int channel) const { return normed * ln_weight[channel] + ln_bias[channel]; }
};

// e^(-2 |distance|). FAST: by the special-function unit, for results that are rounded to 16 bits.
template <bool FAST, class Acc>
VK_DEVICE Acc decay(Acc distance) {
  const Acc magnitude = distance < Acc(0) ? -distance : distance;
  if constexpr (FAST) {
    return exp2_fast(magnitude * (-2.0f * LOG2E));
  } else {
    return exp_(Acc(-2) * magnitude);
  }
}

// phi = 4 e / (1 + e)^2 neither overflows nor cancels, whatever u and the grid.
template <class Acc>
VK_DEVICE Acc phi_of(Acc e) {
  const Acc q = Acc(1) / (Acc(1) + e);
  return Acc(4) * e * q * q;
}

// tanh beside it; never sqrt(1 - phi), which cancels near a centre.
template <class Acc>
VK_DEVICE Acc tanh_of(Acc distance, Acc e) {
  const Acc magnitude = distance < Acc(0) ? -distance : distance;
  if (magnitude < Acc(0.25)) {
    // 1 - e would lose digits: Lambert's continued fraction keeps them.
    const Acc square = distance * distance;
    Acc fraction = Acc(15);
    VK_UNROLL
    for (int odd = 13; odd > 0; odd -= 2) fraction = Acc(odd) + square / fraction;
    return distance / fraction;
  }
  const Acc far = (Acc(1) - e) / (Acc(1) + e);
  return distance < Acc(0) ? -far : far;
}

// For eight grid points and 16-bit weights. With r = e^(2 (u - g) / h) and q = 1 / (1 + r), phi = 4 (q -
// q^2); the four is left to whoever has the sums of products. r is e^(2 u / h) e^(-2 g / h), so that one
// exponential serves a whole channel, and two neighbours can share a reciprocal. What is lost to
// cancellation, far from a centre, 1 - tanh^2 loses too.
constexpr int CENTRES = 8;
// Exponents of two. No 1 + r overflows; where the product of two does, or its reciprocal vanishes, so do both
// of phi, to 2^-30; and so they do where u is beyond its bound.
constexpr float WIDEST_CENTRE = 30.0f, WIDEST_U = 64.0f;

// `tables` is shared memory for 16 floats, ready after a barrier: e^(-2 g / h), then the exponents of two of
// its inverses. Returns whether the grid is narrow enough for the former.
template <class X, class T>
VK_DEVICE bool prepare_centres(float* tables, const Problem<X, T>& p) {
  if (!Config<T>::HALF || p.grids != CENTRES) return false;
  const float unit = p.exponent_unit();
  bool narrow = true;
  for (int m = 0; m < CENTRES; ++m) {
    const float exponent = static_cast<float>(p.grid[m]) * unit;
    narrow = narrow && exponent <= WIDEST_CENTRE && exponent >= -WIDEST_CENTRE;
  }
  if (thread_x() < CENTRES) {
    const float exponent = static_cast<float>(p.grid[thread_x()]) * unit;
    tables[thread_x()] = exp2_fast(-exponent);
    tables[CENTRES + thread_x()] = exponent;
  }
  return narrow;
}

struct Centres {
  Vec<float, 4> low, high;
  VK_DEVICE explicit Centres(const float* table)
      : low(Vec<float, 4>::load(table)), high(Vec<float, 4>::load(table + 4)) {}
  VK_DEVICE float operator[](int m) const { return m < 4 ? low[m] : high[m - 4]; }
};

// Pairs of centres, of four, whose two reciprocals are one and three products: eight cycles of the
// special-function unit less and two instructions more each.
constexpr int SHARED_PAIRS = 4;

// A quarter of phi at all centres for u with e^(2 u / h) = up, in a narrow grid.
template <class T>
VK_DEVICE Vec<T, CENTRES> quarter_phi_of(float up, const Centres& falling) {
  uint32_t pairs[CENTRES / 2];
  VK_UNROLL
  for (int m = 0; m < CENTRES; m += 2) {
    const float first = up * falling[m] + 1.0f, second = up * falling[m + 1] + 1.0f;
    const bool shared = m < 2 * SHARED_PAIRS;
    const float both = shared ? reciprocal_fast(first * second) : 0.0f;
    const float q = shared ? both * second : reciprocal_fast(first);
    const float r = shared ? both * first : reciprocal_fast(second);
    pairs[m / 2] = pack2<T>(q - q * q, r - r * r);
  }
  Vec<T, CENTRES> result;
  memcpy(static_cast<void*>(&result), pairs, sizeof(result));
  return result;
}

// The same for u = exponent h / (2 log2 e).
template <class T>
VK_DEVICE Vec<T, CENTRES> quarter_phi(float exponent, const Centres& falling) {
  return quarter_phi_of<T>(exp2_fast(at_most(exponent, WIDEST_U)), falling);
}

// And for a grid of any width.
template <class T>
VK_DEVICE Vec<T, CENTRES> wide_quarter_phi(float exponent, const Centres& centres) {
  Vec<T, CENTRES> result;
  VK_UNROLL
  for (int m = 0; m < CENTRES; ++m) {
    const float distance = exponent - centres[m];
    const float e = exp2_fast(distance < 0.0f ? distance : -distance), q = reciprocal_fast(1.0f + e);
    result[m] = from_float<T>(e * q * q);
  }
  return result;
}

// Phi / PHI_SCALE of `ROWS` rows from `first_row` on (zeros from end_row on) and of one slice of channels, to
// tile [ROWS][LD].
template <int ROWS, int THREADS, class X, class T>
VK_DEVICE void make_phi(T* tile, const Problem<X, T>& p, int64_t first_row, int64_t end_row, int index,
                        const float* tables, bool narrow) {
  using Acc = typename Problem<X, T>::Acc;
  using C = Config<T>;
  constexpr int LD = C::LD;
  VK_NO_UNROLL
  for (int i = thread_x(); i < ROWS * p.slice; i += THREADS) {
    const int r = static_cast<unsigned>(i) / static_cast<unsigned>(p.slice), c = i - r * p.slice;
    const int channel = index * p.slice + c;
    const int64_t row = first_row + r;
    T* to = tile + r * LD + c * p.grids;
    const bool inside = row < end_row && channel < p.channels;
    const Acc u = inside ? p.u(p.normed(row, channel), channel) : Acc(0);
    if constexpr (Config<T>::HALF) {
      if (narrow) {
        auto values = quarter_phi<T>(u * p.exponent_unit(), Centres(tables));
        if (!inside) values = Vec<T, CENTRES>{};
        values.store(to);
        continue;
      }
    }
    VK_NO_UNROLL
    for (int m = 0; m < p.grids; ++m) {
      const Acc phi = phi_of(decay<Config<T>::HALF>((u - p.grid[m]) * p.inverse)) / Acc(C::PHI_SCALE);
      to[m] = from_accumulate<T>(inside ? phi : Acc(0));
    }
  }
}

// The columns of Phi that pad a tile to the depth of a product.
template <int ROWS, int THREADS, class X, class T>
VK_DEVICE void clear_padding(T* tile, const Problem<X, T>& p) {
  const int columns = p.padded - p.width;
  for (int i = thread_x(); i < ROWS * columns; i += THREADS)
    tile[i / columns * Config<T>::LD + p.width + i % columns] = from_float<T>(0.0f);
}

// tile[r][0 .. padded) = source[r * stride ..], zeros beyond `rows` or `columns`; padded is a multiple of 16.
// Asynchronous where everything is aligned: call cp_async_commit() after it.
template <int ROWS, int THREADS, class T>
VK_DEVICE void load_matrix(T* tile, int ld, const T* source, int64_t stride, int64_t rows, int columns,
                           int padded) {
  constexpr int WIDTH = 16 / sizeof(T);
  const int chunks = padded / WIDTH;
  const bool aligned =
      stride % WIDTH == 0 && columns % WIDTH == 0 && reinterpret_cast<uintptr_t>(source) % 16 == 0;
  VK_NO_UNROLL
  for (int i = thread_x(); i < ROWS * chunks; i += THREADS) {
    const int r = static_cast<unsigned>(i) / static_cast<unsigned>(chunks), column = (i - r * chunks) * WIDTH;
    T* to = tile + r * ld + column;
    if (aligned) {
      const bool valid = r < rows && column < columns;
      cp_async16(to, valid ? source + r * stride + column : source, valid);
      continue;
    }
    Vec<T, WIDTH> values;
    VK_UNROLL
    for (int e = 0; e < WIDTH; ++e)
      values[e] = r < rows && column + e < columns ? source[r * stride + column + e] : from_float<T>(0.0f);
    values.store(to);
  }
}

}  // namespace vitkernels::kan_linear
