// Tile attention on the CPU: the pieces an attention kernel is assembled from.
//
// Everything runs on one matrix product, C[r][l] = add[r][l] + sum_k A(r, k) * B[k][l]: A is read in place,
// one broadcast scalar at a time and with any strides; B and C are scratch with l in the vector lanes. The
// forward pass keeps a tile of queries in the lanes (the softmax then reduces down the rows and never
// across lanes), the backward pass a tile of keys, so no probability matrix is ever transposed. A token-
// dense tensor (a view of an NCHW map) is loaded and stored as it lies, a channel-dense one through a
// transpose in registers.
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
  return kVectorRegisters == 32 ? (vecs <= 3 ? 8 : 6) : (vecs == 1 ? 8 : vecs == 2 ? 6 : 4);
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
};

template <class T, int V, int R>
static __attribute__((noinline)) void multiply_block(const Product<T>& p, int row, int lane) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};

  const T* a = p.a + row * p.a_row;
  const T* b = p.b + lane;
  const ptrdiff_t a_row = p.a_row, a_k = p.a_k, b_k = p.b_k;
  for (int k = p.depth; k > 0; --k) {
    Vec<T> bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = load(b + v * lanes);
#pragma GCC unroll 8
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
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += load(add + r * p.add_row + v * lanes);
  }
  T* c = p.c + row * p.c_row + lane;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * p.c_row + v * lanes, acc[r][v]);
}

template <class T, int V>
static void multiply_columns(const Product<T>& p, int lane) {
  const int blocks = ceil_div(p.rows, max_rows(V));
  int row = 0;
  for (int i = 0; i < blocks; ++i) {
    const int rows = (p.rows - row) / (blocks - i) + ((p.rows - row) % (blocks - i) ? 1 : 0);
    if constexpr (max_rows(V) >= 8) {
      if (rows == 8) multiply_block<T, V, 8>(p, row, lane);
      if (rows == 7) multiply_block<T, V, 7>(p, row, lane);
    }
    if constexpr (max_rows(V) >= 6) {
      if (rows == 6) multiply_block<T, V, 6>(p, row, lane);
      if (rows == 5) multiply_block<T, V, 5>(p, row, lane);
    }
    if (rows == 4) multiply_block<T, V, 4>(p, row, lane);
    if (rows == 3) multiply_block<T, V, 3>(p, row, lane);
    if (rows == 2) multiply_block<T, V, 2>(p, row, lane);
    if (rows == 1) multiply_block<T, V, 1>(p, row, lane);
    row += rows;
  }
}

// Longest run of terms summed in one chain: a longer sum is cut into equal runs, which keeps the rounding
// error of many tokens near that of a blocked library product.
constexpr int kRun = 64;

template <class T>
static void multiply(int vecs, const Product<T>& p) {
  if (p.depth > kRun) {
    Product<T> part = p;
    for (int runs = ceil_div(p.depth, kRun), k = 0; runs > 0; --runs, k += part.depth) {
      part.depth = ceil_div(p.depth - k, runs);
      part.a = p.a + k * p.a_k;
      part.b = p.b + k * p.b_k;
      multiply<T>(vecs, part);
      part.add = p.c;
      part.add_row = p.c_row;
    }
    return;
  }
  int lane = 0;
  for (int groups = ceil_div(vecs, kMaxVecs); groups > 0; --groups) {
    const int v = ceil_div(vecs, groups);
    if constexpr (kMaxVecs >= 4) {
      if (v == 4) multiply_columns<T, 4>(p, lane);
    }
    if (v == 3) multiply_columns<T, 3>(p, lane);
    if (v == 2) multiply_columns<T, 2>(p, lane);
    if (v == 1) multiply_columns<T, 1>(p, lane);
    vecs -= v;
    lane += v * kLanes<T>;
  }
}

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

// ---- softmax

// Down the rows: s <- e^(s - max), inverse <- 1 / sum of that, lse <- max + log(sum).
template <class T, int V>
static void softmax_group(T* s, int width, int rows, T* inverse, T* lse) {
  constexpr int L = kLanes<T>;
  Vec<T> top[V], sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    top[v] = load(s + v * L);
    sum[v] = Vec<T>{};
  }
  for (int r = 1; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) top[v] = vmax(load(s + static_cast<ptrdiff_t>(r) * width + v * L), top[v]);
  for (int r = 0; r < rows;) {
    Vec<T> run[V] = {};
    for (const int end = imin(rows, r + kRun); r < end; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        T* p = s + static_cast<ptrdiff_t>(r) * width + v * L;
        const Vec<T> e = exp_softmax<T>(load(p) - top[v]);
        store(p, e);
        run[v] += e;
      }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] += run[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    store(inverse + v * L, T(1) / sum[v]);
    store(lse + v * L, top[v] + log_softmax<T>(sum[v]));
  }
}

template <class T>
static void softmax(T* s, int vecs, int rows, T* inverse, T* lse) {
  const int width = vecs * kLanes<T>;
  int v = 0;
  for (; v + 2 <= vecs; v += 2)
    softmax_group<T, 2>(s + v * kLanes<T>, width, rows, inverse + v * kLanes<T>, lse + v * kLanes<T>);
  if (v < vecs)
    softmax_group<T, 1>(s + v * kLanes<T>, width, rows, inverse + v * kLanes<T>, lse + v * kLanes<T>);
}

// One tile of queries: out[channel][lane], before the division by the sum of its column.
template <class T>
struct ForwardTile {
  int keys, vecs, head_dim, value_dim;
  const T* q;     // [head_dim][width], times scale
  const T* bias;  // [keys][width]; null: none
  T* s;           // [keys][width]
  T* out;         // [value_dim][width]
  T *inverse, *lse;

  void run(Matrix<const T> k, Matrix<const T> v) const {
    const int width = vecs * kLanes<T>;
    multiply<T>(vecs, {keys, head_dim, k.data, k.token, k.channel, q, width, bias, width, s, width});
    softmax<T>(s, vecs, keys, inverse, lse);
    multiply<T>(vecs, {value_dim, keys, v.data, v.channel, v.token, s, width, nullptr, 0, out, width});
  }
};

// One tile of keys: probabilities p and logit gradients dl, [queries][width]; row r is a query. The logits
// are those of the forward pass to the last bit: the same factors, summed in the same order.
template <class T>
struct BackwardTile {
  int queries, vecs, lanes, head_dim, value_dim;
  const T* k;      // [head_dim][width]
  const T* v;      // [value_dim][width]
  const T* bias;   // [queries][width]; null: none
  const T* lse;    // [queries]
  const T* delta;  // [queries]: sum_m p * dp - grad_lse; when `whole`, - grad_lse alone
  bool whole;      // this tile has all keys, so it finds sum_m p * dp itself
  T *p, *dl;       // [queries][width]

  // q times scale
  void run(Matrix<const T> q, Matrix<const T> grad_out) const {
    const int width = vecs * kLanes<T>;
    multiply<T>(vecs, {queries, head_dim, q.data, q.token, q.channel, k, width, bias, width, p, width});
    multiply<T>(vecs, {queries, value_dim, grad_out.data, grad_out.token, grad_out.channel, v, width,
                       nullptr, 0, dl, width});
    // A lane beyond the tile's keys holds no logit; it must not reach the sum.
    Vec<T> last = broadcast(T(1));
    for (int i = 0; i < kLanes<T>; ++i) last[i] = width - kLanes<T> + i < lanes ? T(1) : T(0);
    const IntVec<T> unused = last == T(0);
    for (int r = 0; r < queries; ++r) {
      T *pr = p + static_cast<ptrdiff_t>(r) * width, *dr = dl + static_cast<ptrdiff_t>(r) * width;
      const Vec<T> shift = broadcast(lse[r]);
      Vec<T> sum = {};
      for (int i = 0; i < width; i += kLanes<T>) {
        Vec<T> e = exp_softmax<T>(load(pr + i) - shift);
        if (i + kLanes<T> == width) e = unused ? Vec<T>{} : e;
        store(pr + i, e);
        sum += e * load(dr + i);
      }
      // Two subtractions: where one key takes all, dp - sum is exactly 0 and only grad_lse is left.
      const Vec<T> mean = broadcast(whole ? across<T>(sum) : T(0)), rest = broadcast(delta[r]);
      for (int i = 0; i < width; i += kLanes<T>) store(dr + i, load(pr + i) * (load(dr + i) - mean - rest));
    }
  }
};

}  // namespace vitkernels::VITKERNELS_ISA
