// Small matrices on the CPU: scratch, the one matrix product, and the way in and out of strided tensors.
//
// The product is C[r][l] = (start[r] + add[r][l] + sum_k A(r, k) * B[k][l]) * factor[l] * row_factor[r]. A is
// read in place, one broadcast scalar at a time and with any strides; B and C have l in the vector lanes.
#pragma once
#include "vitkernels/simd.h"

namespace vitkernels::VITKERNELS_ISA {

// Widest tile, in lanes' elements: S, the bias tile and V of a 49-token window then fit in L1 together.
constexpr int kTileWidth = 64;

// Tokens in the lanes, split into equal tiles.
template <class T>
struct Tiling {
  int tokens, vecs, width, count;
  explicit Tiling(int n) : tokens(n) {
    const int all = ceil_div(n, kLanes<T>);
    count = ceil_div(all, kTileWidth / kLanes<T>);
    vecs = ceil_div(all, count);
    width = vecs * kLanes<T>;
    count = ceil_div(all, vecs);
  }
  int start(int tile) const { return tile * width; }
  int lanes(int tile) const { return imin(width, tokens - start(tile)); }
};

// Carves one allocation into aligned arrays; with a null base it only measures.
struct Scratch {
  char* base;
  size_t used = 0;

  explicit Scratch(void* p) : base(static_cast<char*>(p)) {}
  template <class T>
  T* take(size_t count) {
    char* p = base + used;
    used += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
};

// A matrix [token][channel] of scalars, any strides.
template <class T>
struct Matrix {
  T* data;
  ptrdiff_t token, channel;
};

// ---- matrix product

// Rows that fit in the register file beside `vecs` vectors of B and one broadcast.
constexpr int max_rows(int vecs) {
  constexpr int few[] = {0, 8, 6, 4}, many[] = {0, 8, 8, 8, 6};
  return kVectorRegisters == 32 ? many[vecs] : few[vecs];
}
constexpr int kMaxVecs = kVectorRegisters == 32 ? 4 : 3;

template <class T>
struct Product {
  int rows, depth;
  const T* a;
  ptrdiff_t a_row, a_k;
  const T* b;
  ptrdiff_t b_k;
  const T* add;  // null: nothing; may be c
  ptrdiff_t add_row;
  T* c;
  ptrdiff_t c_row;
  const T* start = nullptr;       // one number a row; null: nothing
  const T* factor = nullptr;      // one number a lane, which multiplies the sums; null: nothing
  const T* row_factor = nullptr;  // the same for the rows
};

template <class T, int V, int R>
static __attribute__((noinline)) void multiply_block(const Product<T>& p, int row, int lane) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vec<T> first = p.start ? broadcast(p.start[row + r]) : Vec<T>{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = first;
  }

  const T* a = p.a + row * p.a_row;
  const T* b = p.b + lane;
  const ptrdiff_t a_row = p.a_row, a_k = p.a_k, b_k = p.b_k;
  for (int k = p.depth; k > 0; --k) {
    Vec<T> bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = load(b + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> av = broadcast(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += av * bv[v];
    }
    a += a_k;
    b += b_k;
  }

  if (p.add) {
    const T* add = p.add + row * p.add_row + lane;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += load(add + r * p.add_row + v * lanes);
  }
  if (p.factor) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<T> f = load(p.factor + lane + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][v] *= f;
    }
  }
  if (p.row_factor) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> f = broadcast(p.row_factor[row + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] *= f;
    }
  }
  T* c = p.c + row * p.c_row + lane;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * p.c_row + v * lanes, acc[r][v]);
}

template <class T, int V, int R>
VITKERNELS_INLINE void multiply_rows(const Product<T>& p, int rows, int row, int lane) {
  if (rows == R)
    multiply_block<T, V, R>(p, row, lane);
  else if constexpr (R > 1)
    multiply_rows<T, V, R - 1>(p, rows, row, lane);
}

// Longest run of terms summed in one chain: a longer sum is cut into equal runs, which keeps the rounding
// error of many tokens near that of a blocked library product. Shorter without FMA, where a term rounds
// twice.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int kRun = 64;
#else
constexpr int kRun = 8;
#endif

// C of p.rows rows and `vecs` vectors. Compiled once for all operators, in csrc/matrix_cpu.cpp.
template <class T>
void multiply(int vecs, const Product<T>& p, int run = kRun);
extern template void multiply(int, const Product<float>&, int);
extern template void multiply(int, const Product<double>&, int);

// ---- tensors to and from scratch

// dst[row][lane] = factor * src[row * row_stride + lane * lane_stride]; lanes up to the next multiple of
// the vector become 0.
template <class E, class T>
static void pack(T* dst, int width, const E* src, ptrdiff_t row_stride, ptrdiff_t lane_stride, int rows,
                 int lanes, T factor) {
  constexpr int L = kLanes<T>;
  const Vec<T> f = broadcast(factor);
  if (lane_stride == 1) {
    const int whole = lanes / L * L;
    for (int r = 0; r < rows; ++r, src += row_stride, dst += width) {
      for (int i = 0; i < whole; i += L) store(dst + i, load(src + i) * f);
      if (whole < lanes) store(dst + whole, load_first(src + whole, lanes - whole) * f);
    }
  } else if (row_stride == 1) {
    for (int i = 0; i < lanes; i += L) {
      const int tokens = imin(L, lanes - i);
      for (int r = 0; r < rows; r += L) {
        const int channels = imin(L, rows - r);
        Vec<T> block[L];
        const E* from = src + i * lane_stride + r;
        if (channels == L && tokens == L) {
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) block[j] = load(from + j * lane_stride) * f;
        } else {
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j)
            block[j] = j < tokens ? load_first(from + j * lane_stride, channels) * f : Vec<T>{};
        }
        transpose<T>(block);
        T* to = dst + static_cast<ptrdiff_t>(r) * width + i;
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j)
          if (j < channels) store(to + static_cast<ptrdiff_t>(j) * width, block[j]);
      }
    }
  } else {
    const int padded = round_up_lanes<T>(lanes);
    for (int r = 0; r < rows; ++r, src += row_stride, dst += width) {
      for (int i = 0; i < lanes; ++i) dst[i] = load_one(src + i * lane_stride) * factor;
      for (int i = lanes; i < padded; ++i) dst[i] = 0;
    }
  }
}

// dst[row * row_stride + lane * lane_stride] = factor[lane] * src[row][lane]
template <class E, class T>
static void unpack(E* dst, ptrdiff_t row_stride, ptrdiff_t lane_stride, const T* src, int width, int rows,
                   int lanes, const T* factor) {
  constexpr int L = kLanes<T>;
  if (lane_stride == 1) {
    const int whole = lanes / L * L;
    for (int r = 0; r < rows; ++r, dst += row_stride, src += width) {
      for (int i = 0; i < whole; i += L) store(dst + i, load(src + i) * load(factor + i));
      if (whole < lanes) store_first(dst + whole, load(src + whole) * load(factor + whole), lanes - whole);
    }
  } else if (row_stride == 1) {
    for (int i = 0; i < lanes; i += L) {
      const int tokens = imin(L, lanes - i);
      const Vec<T> f = load(factor + i);
      for (int r = 0; r < rows; r += L) {
        const int channels = imin(L, rows - r);
        Vec<T> block[L];
        const T* from = src + static_cast<ptrdiff_t>(r) * width + i;
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j)
          block[j] = j < channels ? load(from + static_cast<ptrdiff_t>(j) * width) * f : Vec<T>{};
        transpose<T>(block);
        E* to = dst + i * lane_stride + r;
        if (channels == L && tokens == L) {
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) store(to + j * lane_stride, block[j]);
        } else {
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j)
            if (j < tokens) store_first(to + j * lane_stride, block[j], channels);
        }
      }
    }
  } else {
    for (int r = 0; r < rows; ++r, dst += row_stride, src += width)
      for (int i = 0; i < lanes; ++i) store_one(dst + i * lane_stride, src[i] * factor[i]);
  }
}

// Elements of scratch that copy() needs.
template <class T>
VITKERNELS_INLINE size_t copy_size(int tokens, int channels) {
  const size_t a = static_cast<size_t>(channels) * round_up_lanes<T>(tokens);
  const size_t b = static_cast<size_t>(tokens) * round_up_lanes<T>(channels);
  return a > b ? a : b;
}

// factor * m in scratch, laid out as m lies.
template <class E, class T>
static Matrix<const T> copy(Matrix<const E> m, int tokens, int channels, T factor, T* scratch) {
  if (m.channel == 1) {
    const int width = round_up_lanes<T>(channels);
    pack(scratch, width, m.data, m.token, m.channel, tokens, channels, factor);
    return {scratch, width, 1};
  }
  const int width = round_up_lanes<T>(tokens);
  pack(scratch, width, m.data, m.channel, m.token, channels, tokens, factor);
  return {scratch, 1, width};
}

// The tensor as the A of a product: in place where no conversion is needed.
template <class E, class T>
VITKERNELS_INLINE Matrix<const T> readable(Matrix<const E> m, int tokens, int channels, T* scratch) {
  if constexpr (kSame<E, T>)
    return m;
  else
    return copy(m, tokens, channels, T(1), scratch);
}

}  // namespace vitkernels::VITKERNELS_ISA
