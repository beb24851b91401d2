// The residual FFN on one core, one instruction set.
//
// Floor of a position: 4 channels * hidden + 18 channels FLOPs at 2 FMAs a cycle. Positions lie in the vector
// lanes and the weights are read where they are, one broadcast at a time, so nothing is packed and nothing
// derived from a weight is kept. Bytes: the map once in, once out, and the weights once a group of positions.
#include "cpu_kernel.h"

#include "vitkernels/matrix_cpu.h"

namespace vitkernels::residual_ffn {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

namespace {

// Most rows of a product that are multiplied with a panel of B while it is in L1, beside them.
constexpr int kChunk = 64;
// Terms summed in one chain: each run loads and stores the sums anew, for which kRun alone is short.
constexpr int kTerms = 2 * kRun;

// Rows of each chunk but the last: even ones, since a short chunk fetches panels for little work.
int chunk_rows(int rows) {
  return ceil_div(ceil_div(rows, ceil_div(rows, kChunk)), 4) * 4;
}

// What a group covers: whole images, or some rows of one.
struct Group {
  int64_t first;  // image
  int images, top, rows;
  int tokens;  // of all images

  Group(const Params& p, const Plan& plan, int64_t group) {
    first = group / plan.bands * plan.images;
    images = static_cast<int>(plan.images < p.batch - first ? plan.images : p.batch - first);
    top = static_cast<int>(group % plan.bands) * plan.rows;
    rows = imin(plan.rows, p.height - top);
    tokens = images * rows * p.width;
  }
};

// Elements between two rows of u and of the hidden layer. A row's last vector may reach beyond its tokens;
// the slack keeps it out of the next row, which may be another thread's.
template <class T>
int pitch_of(const Params& p, const Plan& plan) {
  return round_up_lanes<T>(static_cast<int>(plan.images) * plan.rows * p.width) + kLanes<T>;
}

template <class T>
struct Shared {
  T *u, *hidden;
  size_t size;

  Shared(const Params& p, const Plan& plan, Scratch scratch) {
    const size_t pitch = pitch_of<T>(p, plan);
    u = scratch.take<T>(p.channels * pitch);
    hidden = scratch.take<T>(p.hidden * pitch);
    size = scratch.used;
  }
};

template <class T>
struct Own {
  T *input, *padded, *product, *weights, *ones;
  int input_pitch;
  size_t size;

  Own(const Params& p, const Plan& plan, Scratch scratch) {
    const int halo = plan.rows + 2, longest = p.channels > p.hidden ? p.channels : p.hidden;
    const bool converts = p.dtype == DType::f16 || p.dtype == DType::bf16;
    input_pitch = round_up_lanes<T>(halo * p.width) + kLanes<T>;
    input = scratch.take<T>(p.dw_weight ? static_cast<size_t>(kUnit) * input_pitch : 0);
    padded = scratch.take<T>(p.dw_weight ? static_cast<size_t>(halo + 1) * (p.width + 1) + 2 * kLanes<T> : 0);
    product = scratch.take<T>(static_cast<size_t>(kChunk) * pitch_of<T>(p, plan));
    weights = scratch.take<T>(converts ? copy_size<T>(kChunk, longest) : 0);
    ones = scratch.take<T>(pitch_of<T>(p, plan));
    size = scratch.used;
  }
};

template <class T>
T element(const Params& p, const void* data, int64_t i) {
  if (p.vector_dtype == DType::f64) return static_cast<T>(static_cast<const double*>(data)[i]);
  if (p.vector_dtype == DType::f32) return static_cast<T>(static_cast<const float*>(data)[i]);
  if (p.vector_dtype == DType::f16) return static_cast<T>(load_one(static_cast<const f16*>(data) + i));
  return static_cast<T>(load_one(static_cast<const bf16*>(data) + i));
}

template <class T>
T element(const Params& p, const View& vector, int64_t i, T absent = T(0)) {
  return vector ? element<T>(p, vector.data, i * vector.stride[0]) : absent;
}

// ---- u = x + dw(x)

// One channel of some rows of one image. `from` points at its row `top`; rows outside of the map are zeros.
template <class T>
void depthwise(const Params& p, int channel, const T* from, int top, int rows, T* padded, T* to) {
  constexpr int L = kLanes<T>;
  const int width = p.width, pitch = width + 1;
  // A row is followed by one zero, which is also the zero before the next row.
  const int first = top > 0 ? -1 : 0, last = top + rows < p.height ? rows + 1 : rows;
  T* line = padded;
  for (int i = 0; i <= pitch; ++i) line[i] = 0;
  for (int row = first; row < last; ++row) {
    line = padded + 1 + (row + 1) * pitch;
    for (int i = 0; i < width; i += L) store(line + i, load(from + row * width + i));
    line[width] = 0;
  }
  if (last == rows)
    for (int i = 0; i <= pitch; ++i) line[pitch + i] = 0;

  T taps[9];
  for (int i = 0; i < 9; ++i) {
    const int64_t* stride = p.dw_weight.stride;
    taps[i] = element<T>(p, p.dw_weight.data, channel * stride[0] + i / 3 * stride[1] + i % 3 * stride[2]);
  }
  const Vec<T> bias = broadcast(element<T>(p, p.dw_bias, channel));
  for (int row = 0; row < rows; ++row) {
    const T* above = padded + row * pitch;
    for (int i = 0; i < width; i += L) {
      const T* at = above + i;
      Vec<T> sum = bias;
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r)
#pragma GCC unroll 3
        for (int c = 0; c < 3; ++c) sum += broadcast(taps[3 * r + c]) * load(at + r * pitch + c);
      store(to + row * width + i, sum + load(at + pitch + 1));
    }
  }
}

template <class E, class T>
void input_rows(const Params& p, const Group& g, int pitch, int begin, int end, const Own<T>& own, T* u) {
  const E* x = static_cast<const E*>(p.x.data);
  const int map = g.rows * p.width;
  // Lanes beyond the tokens are computed with like the others: zeros are as fast as anything, leftovers may
  // not be.
  for (int c = begin; c < end; ++c)
    store(u + static_cast<ptrdiff_t>(c) * pitch + (g.tokens - 1) / kLanes<T> * kLanes<T>, Vec<T>{});
  if (!p.dw_weight) {
    for (int i = 0; i < g.images; ++i)
      pack(u + static_cast<ptrdiff_t>(begin) * pitch + i * map, pitch,
           x + (g.first + i) * p.x.stride[0] + begin * p.x.stride[1] + g.top * p.width * p.x.stride[2],
           p.x.stride[1], p.x.stride[2], end - begin, map, T(1));
    return;
  }
  const int before = g.top > 0 ? 1 : 0, after = g.top + g.rows < p.height ? 1 : 0;
  for (int channel = begin; channel < end; channel += kUnit) {
    const int count = imin(kUnit, end - channel);
    for (int i = 0; i < g.images; ++i) {
      pack(own.input, own.input_pitch,
           x + (g.first + i) * p.x.stride[0] + channel * p.x.stride[1] +
               (g.top - before) * p.width * p.x.stride[2],
           p.x.stride[1], p.x.stride[2], count, (g.rows + before + after) * p.width, T(1));
      for (int c = 0; c < count; ++c)
        depthwise(p, channel + c, own.input + c * own.input_pitch + before * p.width, g.top, g.rows,
                  own.padded, u + static_cast<ptrdiff_t>(channel + c) * pitch + i * map);
    }
  }
}

// ---- the two products

// Fetches a block of a weight whose rows lie densely: 64 bytes at a time, the rows' next terms or the next
// rows.
template <class E>
VITKERNELS_INLINE void fetch(const View& weight, int row, int rows, int k, int terms) {
  if (weight.stride[1] != 1) return;
  const char* at =
      reinterpret_cast<const char*>(static_cast<const E*>(weight.data) + row * weight.stride[0] + k);
  const ptrdiff_t step = weight.stride[0] * static_cast<ptrdiff_t>(sizeof(E));
  for (int r = 0; r < rows; ++r, at += step)
    for (int i = 0; i < terms * static_cast<int>(sizeof(E)); i += 64) __builtin_prefetch(at + i);
}

// product[row][token] = sum over k of weight[begin + row][k] * b[k][token], for up to `most` rows of those
// before `end`. The terms are added in runs; while one is computed the weights of the next come from the
// third-level cache or beyond, in pieces too short for the processor to foresee.
template <class E, class T>
void product_rows(const View& weight, int begin, int end, int most, int depth, const T* b, int pitch,
                  int vecs, T* product, T* scratch) {
  const int rows = imin(most, end - begin);
  const Matrix<const E> source{static_cast<const E*>(weight.data) + begin * weight.stride[0],
                               weight.stride[0], weight.stride[1]};
  const Matrix<const T> a = readable<E, T>(source, rows, depth, scratch);
  Product<T> part{rows, depth, a.data, a.token, a.channel, b, pitch, nullptr, 0, product, pitch};
  for (int runs = ceil_div(depth, kTerms), k = 0; runs > 0; --runs, k += part.depth) {
    part.depth = ceil_div(depth - k, runs);
    if (runs > 1)
      fetch<E>(weight, begin, rows, k + part.depth, part.depth);
    else if (begin + rows < end)
      fetch<E>(weight, begin + rows, imin(most, end - begin - rows), 0, kTerms);
    part.a = a.data + k * a.channel;
    part.b = b + static_cast<ptrdiff_t>(k) * pitch;
    multiply<T>(vecs, part, kTerms);
    part.add = product;
    part.add_row = pitch;
  }
}

template <class E, class T>
void hidden_rows(const Params& p, int pitch, int vecs, int begin, int end, const Own<T>& own, const T* u,
                 T* hidden) {
  constexpr int L = kLanes<T>;
  const int most = chunk_rows(end - begin);
  for (int row = begin; row < end; row += most) {
    const int count = imin(most, end - row);
    T* chunk = hidden + static_cast<ptrdiff_t>(row) * pitch;
    product_rows<E, T>(p.weight1, row, end, most, p.channels, u, pitch, vecs, chunk, own.weights);
    for (int r = 0; r < count; ++r, chunk += pitch) {
      const Vec<T> scale = broadcast(element<T>(p, p.scale1, row + r, T(1)));
      const Vec<T> bias = broadcast(element<T>(p, p.bias1, row + r));
      // max(0, y) in this order lets a NaN through.
      for (int v = 0; v < vecs; ++v) store(chunk + v * L, vmax(Vec<T>{}, load(chunk + v * L) * scale + bias));
    }
  }
}

template <class E, class T>
void output_rows(const Params& p, const Group& g, int pitch, int vecs, int begin, int end, const Own<T>& own,
                 const T* u, const T* hidden) {
  constexpr int L = kLanes<T>;
  const int map = g.rows * p.width;
  E* out = static_cast<E*>(p.out.data);
  for (int i = 0; i < map + L; i += L) store(own.ones + i, broadcast(T(1)));
  const int most = chunk_rows(end - begin);
  for (int row = begin; row < end; row += most) {
    const int count = imin(most, end - row);
    product_rows<E, T>(p.weight2, row, end, most, p.hidden, hidden, pitch, vecs, own.product, own.weights);
    for (int r = 0; r < count; ++r) {
      T* y = own.product + static_cast<ptrdiff_t>(r) * pitch;
      const T* residual = u + static_cast<ptrdiff_t>(row + r) * pitch;
      const Vec<T> scale = broadcast(element<T>(p, p.scale2, row + r, T(1)));
      const Vec<T> bias = broadcast(element<T>(p, p.bias2, row + r));
      for (int v = 0; v < vecs; ++v)
        store(y + v * L, load(residual + v * L) + (load(y + v * L) * scale + bias));
    }
    for (int i = 0; i < g.images; ++i)
      unpack(
          out + (g.first + i) * p.out.stride[0] + row * p.out.stride[1] + g.top * p.width * p.out.stride[2],
          p.out.stride[1], p.out.stride[2], own.product + i * map, pitch, count, map, own.ones);
  }
}

template <class E>
void run_as(const Params& p, const Plan& plan, Stage stage, int64_t group, int begin, int end,
            void* group_memory, void* thread_memory) {
  using T = Compute<E>;
  const Group g(p, plan, group);
  const Shared<T> shared(p, plan, Scratch(group_memory));
  const Own<T> own(p, plan, Scratch(thread_memory));
  const int pitch = pitch_of<T>(p, plan), vecs = ceil_div(g.tokens, kLanes<T>);
  if (stage == kInput)
    input_rows<E, T>(p, g, pitch, begin, end, own, shared.u);
  else if (stage == kHidden)
    hidden_rows<E, T>(p, pitch, vecs, begin, end, own, shared.u, shared.hidden);
  else
    output_rows<E, T>(p, g, pitch, vecs, begin, end, own, shared.u, shared.hidden);
}

void run(const Params& p, const Plan& plan, Stage stage, int64_t group, int begin, int end,
         void* group_memory, void* thread_memory) {
  if (p.dtype == DType::f64)
    run_as<double>(p, plan, stage, group, begin, end, group_memory, thread_memory);
  else if (p.dtype == DType::f32)
    run_as<float>(p, plan, stage, group, begin, end, group_memory, thread_memory);
  else if (p.dtype == DType::f16)
    run_as<f16>(p, plan, stage, group, begin, end, group_memory, thread_memory);
  else
    run_as<bf16>(p, plan, stage, group, begin, end, group_memory, thread_memory);
}

size_t group_bytes(const Params& p, const Plan& plan) {
  return p.dtype == DType::f64 ? Shared<double>(p, plan, Scratch(nullptr)).size
                               : Shared<float>(p, plan, Scratch(nullptr)).size;
}

size_t thread_bytes(const Params& p, const Plan& plan) {
  return p.dtype == DType::f64 ? Own<double>(p, plan, Scratch(nullptr)).size
                               : Own<float>(p, plan, Scratch(nullptr)).size;
}

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel{group_bytes, thread_bytes, run};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::residual_ffn
