// The projection's share of the backward on tensor cores: a kernel of its own, because it needs all channels
// of a token at once and no other token, and the window kernel all tokens of a window and one head's
// channels: together they would not fit shared memory in the later stages.
//
// Floor per token: 2 C^2 FLOPs, and C elements each of grad_out, heads and grad_z. A block takes 64 tokens,
// so that the weights pass from L2 once for 64.
#include "backward.h"
#include "tensor.h"

namespace vitkernels::cascaded_group_attention {
namespace {

using tile_attention::Carver;
using tile_attention::Product;
using tile_attention::ProductTile;
using tile_attention::Weights;

constexpr int PROJ_ROWS = 64;

struct ProjLayout {
  int ld;
  int offsets, heads_offsets, grad_heads_offsets;  // of each row
  int grad_out;
  ProductTile tile;
  int64_t bytes;

  explicit ProjLayout(const Problem& problem) : ld(leading_dimension<half_t>(problem.params.channels)) {
    Carver carver;
    tile = ProductTile::choose(PROJ_ROWS, THREADS / 32, problem.params.channels, 32);
    offsets = carver.take<int64_t>(PROJ_ROWS);
    heads_offsets = carver.take<int64_t>(PROJ_ROWS);
    grad_heads_offsets = carver.take<int64_t>(PROJ_ROWS);
    grad_out = carver.take<half_t>(PROJ_ROWS * ld);
    tile.buffers = carver.take<half_t>(2 * tile.elements);
    bytes = carver.used();
  }
};

// grad_z = (W_proj^T grad_out where heads > 0) + grad_heads, for 64 tokens.
template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 2)
    backward_projection_kernel(Problem problem, ProjLayout layout, T* grad_z) {
  const Params& params = problem.params;
  char* shared = shared_memory();
  auto* offsets = reinterpret_cast<int64_t*>(shared + layout.offsets);
  auto* heads_offsets = reinterpret_cast<int64_t*>(shared + layout.heads_offsets);
  auto* grad_heads_offsets = reinterpret_cast<int64_t*>(shared + layout.grad_heads_offsets);
  T* grad_out = reinterpret_cast<T*>(shared + layout.grad_out);
  const int channels = params.channels, tokens = problem.tokens;
  const int64_t first_row = static_cast<int64_t>(block_x()) * PROJ_ROWS, all = problem.windows * tokens;
  const Weights weights{
      params.proj_weight.data, params.proj_weight.stride[0], params.proj_weight.stride[1], channels, channels,
      problem.wide_weights};
  Product<T> product(layout.tile, shared);

  product.template start<false>(weights);
  if (thread_x() < PROJ_ROWS) {
    const int64_t row = first_row + thread_x(), window = row / tokens;
    const int token = static_cast<int>(row - window * tokens);
    offsets[thread_x()] =
        present(params.grad_out) && row < all ? problem.offset(params.grad_out, window, token) : -1;
    heads_offsets[thread_x()] = Problem::heads_offset(params.heads, window, token);
    grad_heads_offsets[thread_x()] = Problem::heads_offset(params.grad_heads, window, token);
  }
  sync_block();
  const auto source_channels = Channels::of<T>(params.grad_out);
  const Walk walk(PROJ_ROWS, channels, params.grad_out);
  VK_NO_UNROLL
  for (int i = thread_x(); i < walk.visits(); i += block_dim_x()) {
    const int row = walk.row(i), channel = walk.channel(i);
    const auto* source =
        static_cast<const T*>(params.grad_out.data) + offsets[row] + channel * source_channels.stride;
    (offsets[row] < 0 ? zeros<T>() : source_channels.load(source))
        .store(grad_out + row * layout.ld + channel);
  }
  product.template run<false>(
      grad_out, layout.ld, PROJ_ROWS, weights,
      [&](int row, int n, int offset, float first, float second) {
        if (first_row + row >= all) return;
        const int column = n + offset;
        const auto value = [&](const View& view, int64_t of_row, int c) {
          return to_float(static_cast<const T*>(view.data)[of_row + (column + c) * view.stride[2]]);
        };
        if (!(value(params.heads, heads_offsets[row], 0) > 0.0f)) first = 0.0f;
        if (!(value(params.heads, heads_offsets[row], 1) > 0.0f)) second = 0.0f;
        if (present(params.grad_heads)) {
          first += value(params.grad_heads, grad_heads_offsets[row], 0);
          second += value(params.grad_heads, grad_heads_offsets[row], 1);
        }
        Vec<T, 2>{{from_float<T>(first), from_float<T>(second)}}.store(grad_z + (first_row + row) * channels +
                                                                       column);
      },
      [](int, int) {});
}

}  // namespace

bool projection_fits(const Problem& problem) {
  return ProjLayout(problem).bytes <= tile_attention::SHARED_LIMIT;
}

template <class T>
void backward_projection(const Problem& problem, T* grad_z, Stream stream) {
  const ProjLayout layout(problem);
  const int64_t rows = problem.windows * problem.tokens;
  launch(backward_projection_kernel<T>, Dim3{(rows + PROJ_ROWS - 1) / PROJ_ROWS}, THREADS,
         static_cast<size_t>(layout.bytes), stream, problem, layout, grad_z);
}

template void backward_projection<half_t>(const Problem&, half_t*, Stream);
template void backward_projection<bfloat16_t>(const Problem&, bfloat16_t*, Stream);

}  // namespace vitkernels::cascaded_group_attention
