// Backward: what goes through the activation, and the sum over tokens for the bias with it; dX, the product
// with the transpose of forward's matrix; dW at stored blocks.
//
// Floor: twice the forward's FLOPs; the first step is bound by memory, which dY crosses once more for it, and
// what forward kept.
#include "elements.h"
#include "parts.h"
#include "product.h"
#include "vitkernels/tile_attention.h"

namespace vitkernels::block_sparse_linear {
namespace {

constexpr int COLUMN_WARPS = 8;

template <class T>
struct ColumnProblem {
  const T *grad_y, *kept;     // kept: what went into a GELU, what came out of a ReLU
  T* grad_before;             // null without an activation
  accumulate_t<T>* partials;  // [parts][features], or null
  int64_t tokens, share, grad_row, kept_row;
  int features;
  Activation activation;
  bool vectors;
};

template <class Acc>
VK_DEVICE Acc activation_gradient(Acc gradient, Acc kept, Activation activation) {
  if (activation == Activation::relu) return kept <= Acc(0) ? Acc(0) : gradient;
  const Acc below = Acc(0.5) * (Acc(1) + erf_(kept * Acc(0.70710678118654752440)));
  const Acc density = Acc(0.39894228040143267794) * exp_(Acc(-0.5) * kept * kept);
  return gradient * (below + kept * density);
}

template <class T>
VK_DEVICE Vec<T, WIDTH<T>> read(const T* from, int count, bool vectors) {
  if (vectors) return Vec<T, WIDTH<T>>::load(from);
  Vec<T, WIDTH<T>> values;
  VK_UNROLL
  for (int e = 0; e < WIDTH<T>; ++e) values[e] = e < count ? from[e] : from_float<T>(0.0f);
  return values;
}

// A lane takes 16 bytes of columns, a warp every COLUMN_WARPS-th token of a part.
template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(32 * COLUMN_WARPS, sizeof(T) == 8 ? 2 : 4) column_kernel(ColumnProblem<T> p) {
  using Acc = accumulate_t<T>;
  constexpr int COLUMNS = 32 * WIDTH<T>;
  const int column = block_x() * COLUMNS + lane_id() * WIDTH<T>, count = p.features - column;
  const int64_t begin = block_y() * p.share, end = begin + p.share < p.tokens ? begin + p.share : p.tokens;
  Acc sums[WIDTH<T>];
  VK_UNROLL
  for (int e = 0; e < WIDTH<T>; ++e) sums[e] = Acc(0);
  if (count > 0) {
    VK_NO_UNROLL
    for (int64_t token = begin + warp_id(); token < end; token += COLUMN_WARPS) {
      auto gradient = read(p.grad_y + token * p.grad_row + column, count, p.vectors);
      if (p.grad_before != nullptr) {
        const auto kept = read(p.kept + token * p.kept_row + column, count, p.vectors);
        T* to = p.grad_before + token * p.features + column;
        VK_UNROLL
        for (int e = 0; e < WIDTH<T>; ++e)
          gradient[e] = from_accumulate<T>(
              activation_gradient(to_accumulate(gradient[e]), to_accumulate(kept[e]), p.activation));
        if (p.vectors) {
          gradient.store(to);
        } else {
          VK_UNROLL
          for (int e = 0; e < WIDTH<T>; ++e)
            if (e < count) to[e] = gradient[e];
        }
      }
      VK_UNROLL
      for (int e = 0; e < WIDTH<T>; ++e) sums[e] += to_accumulate(gradient[e]);
    }
  }
  if (p.partials == nullptr) return;
  Acc* shared = reinterpret_cast<Acc*>(shared_memory());
  constexpr int PART = WIDTH<T> < WIDTH<Acc> ? WIDTH<T> : WIDTH<Acc>;
  VK_UNROLL
  for (int e = 0; e < WIDTH<T>; e += PART) {
    Vec<Acc, PART> part;
    VK_UNROLL
    for (int i = 0; i < PART; ++i) part[i] = sums[e + i];
    part.store(shared + warp_id() * COLUMNS + lane_id() * WIDTH<T> + e);
  }
  sync_block();
  VK_NO_UNROLL
  for (int c = thread_x(); c < COLUMNS; c += 32 * COLUMN_WARPS) {
    if (block_x() * COLUMNS + c >= p.features) break;
    Acc sum = Acc(0);
    for (int warp = 0; warp < COLUMN_WARPS; ++warp) sum += shared[warp * COLUMNS + c];
    p.partials[static_cast<int64_t>(block_y()) * p.features + block_x() * COLUMNS + c] = sum;
  }
}

struct ColumnPlan {
  int64_t blocks, bytes;
  Parts parts;

  explicit ColumnPlan(const Params& p)
      : blocks(ceil_div(p.given(), 32 * (16 / bytes_of(p.dtype)))),
        parts(p.tokens, MANY_BLOCKS / blocks, COLUMN_WARPS) {
    const int64_t wide = p.dtype == DType::f64 ? 8 : 4;
    bytes = p.grad_bias ? ceil_div(parts.count * p.given() * wide, 256) * 256 : 0;
  }
  static int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
};

template <class T>
void columns(const Params& p, void* workspace, Stream stream) {
  using Acc = accumulate_t<T>;
  const ColumnPlan plan(p);
  const View& kept = p.activation == Activation::relu ? p.y : p.before;
  ColumnProblem<T> c;
  c.grad_y = static_cast<const T*>(p.grad_y.data);
  c.kept = static_cast<const T*>(kept.data);
  c.grad_before = static_cast<T*>(p.grad_before.data);
  c.partials = p.grad_bias ? static_cast<Acc*>(workspace) : nullptr;
  c.tokens = p.tokens;
  c.share = plan.parts.share;
  c.grad_row = p.grad_y.stride[0];
  c.kept_row = kept.stride[0];
  c.features = p.given();
  c.activation = p.activation;
  c.vectors = c.features % WIDTH<T> == 0 && aligned<T>(p.grad_y) &&
              (!p.grad_before || (aligned<T>(kept) && aligned<T>(p.grad_before)));
  launch(column_kernel<T>, Dim3{plan.blocks, plan.parts.count}, 32 * COLUMN_WARPS,
         sizeof(Acc) * COLUMN_WARPS * 32 * WIDTH<T>, stream, c);
  if (c.partials != nullptr)
    reduce<Acc, T>(c.partials, plan.parts.count, c.features, static_cast<T*>(p.grad_bias.data), stream);
}

}  // namespace

// In this order, each beginning at a multiple of 256 bytes: the columns' partial sums, the product's lists,
// dW's partial sums.
int64_t backward_workspace_cuda(const Params& p) {
  return ColumnPlan(p).bytes + product_workspace(p, !p.transposed) +
         (p.grad_values ? weight_gradient_workspace(p) : 0);
}

void backward_cuda(const Params& p, Stream stream) {
  if (p.grad_bias || p.grad_before)
    with_dtype(p.dtype, [&](auto zero) { columns<decltype(zero)>(p, p.workspace, stream); });
  const View& gradient = p.grad_before ? p.grad_before : p.grad_y;
  char* workspace = static_cast<char*>(p.workspace) + ColumnPlan(p).bytes;
  if (p.grad_x) product(p, {!p.transposed, Activation::none, gradient, {}, {}, p.grad_x, workspace}, stream);
  if (p.grad_values) weight_gradient(p, gradient, workspace + product_workspace(p, !p.transposed), stream);
}

}  // namespace vitkernels::block_sparse_linear
