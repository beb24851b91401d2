// Forward of the plain path, in one launch. The bounds are those of forward.cu with the rate of the CUDA
// cores.
#include "plain.h"

namespace vitkernels::cascaded_group_attention {
namespace {

struct PlainForwardLayout {
  int ld_z, ld_y, ld_q, ld_p;
  int z, y, q, p;
  int64_t bytes;

  template <class Acc>
  static PlainForwardLayout of(const Problem& problem) {
    PlainForwardLayout layout;
    layout.ld_z = plain_pitch(problem.params.channels);
    layout.ld_y = plain_pitch(problem.qkv_rows);
    layout.ld_q = plain_pitch(problem.params.key_dim);
    layout.ld_p = plain_pitch(problem.tokens);
    tile_attention::Carver carver;
    const int64_t tokens = problem.tokens;
    layout.z = carver.take<Acc>(tokens * layout.ld_z);
    layout.y = carver.take<Acc>(tokens * layout.ld_y);
    layout.q = carver.take<Acc>(tokens * layout.ld_q);
    layout.p = carver.take<Acc>(tokens * layout.ld_p);
    layout.bytes = carver.used();
    return layout;
  }
};

// z holds a window's x; head by head its columns become U_i, O_i and relu(O_i), as in forward.cu.
template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 1)
    forward_plain_kernel(Problem problem, PlainForwardLayout layout, PlainSlots slots) {
  using Acc = accumulate_t<T>;
  const Params& params = problem.params;
  char* base = slots.base(params.workspace);
  Acc *z = reinterpret_cast<Acc*>(base + layout.z), *y = reinterpret_cast<Acc*>(base + layout.y),
      *q = reinterpret_cast<Acc*>(base + layout.q), *p = reinterpret_cast<Acc*>(base + layout.p);
  const int tokens = problem.tokens, channels = params.channels, d = problem.value_dim, k = params.key_dim;
  const int ld_z = layout.ld_z, ld_y = layout.ld_y, ld_p = layout.ld_p;
  const auto* x = static_cast<const T*>(params.x.data);
  auto* heads = static_cast<T*>(params.heads.data);
  auto* out = static_cast<T*>(params.out.data);
  const View &proj_weight = params.proj_weight, &proj_bias = params.proj_bias;

  for (int64_t window = block_x(); window < problem.windows; window += grid_x()) {
    for (int i = thread_x(); i < tokens * channels; i += block_dim_x()) {
      const int token = i % tokens, channel = i / tokens;
      const int64_t offset = problem.offset(params.x, window, token);
      z[token * ld_z + channel] =
          offset < 0 ? Acc(0) : to_accumulate(x[offset + channel * params.x.stride[1]]);
    }
    sync_block();
    for (int head = 0; head < params.num_heads; ++head) {
      Acc* u = z + head * d;
      plain_qkv<T>(problem, head, u, ld_z, y, ld_y);
      sync_block();
      plain_queries<T>(problem, head, y, ld_y, q, layout.ld_q);
      sync_block();
      plain_softmax<T>(problem, head, q, layout.ld_q, y, ld_y, p, ld_p);
      block_product<Acc>(
          tokens, d, tokens, [&](int row, int m) { return p[row * ld_p + m]; },
          [&](int m, int column) { return y[m * ld_y + 2 * k + column]; },
          [&](int row, int column, Acc sum) { u[row * ld_z + column] = rounded<T>(sum); });
      sync_block();
      for (int i = thread_x(); i < tokens * d; i += block_dim_x()) {
        const int token = i / d, channel = i % d;
        Acc* here = u + token * ld_z + channel;
        const Acc output = *here;
        if (heads != nullptr)
          heads[Problem::heads_offset(params.heads, window, token) +
                (head * d + channel) * params.heads.stride[2]] = from_accumulate<T>(output);
        if (head + 1 < params.num_heads) here[d] = rounded<T>(output + here[d]);
        *here = relu(output);
      }
      sync_block();
    }
    block_product<Acc>(
        tokens, channels, channels, [&](int row, int c) { return z[row * ld_z + c]; },
        [&](int c, int column) {
          return read<T>(proj_weight, problem.wide_weights,
                         column * proj_weight.stride[0] + c * proj_weight.stride[1]);
        },
        [&](int row, int column, Acc sum) {
          const int64_t target = problem.offset(params.out, window, row);
          if (target < 0) return;
          sum += read<T>(proj_bias, problem.wide_weights, column * proj_bias.stride[0]);
          if (params.residual) {
            const int64_t source = problem.offset(params.x, window, row) + column * params.x.stride[1];
            sum = rounded<T>(sum) + to_accumulate(x[source]);
          }
          out[target + column * params.out.stride[1]] = from_accumulate<T>(sum);
        });
    sync_block();  // before the next window overwrites z
  }
}

}  // namespace

template <class T>
int64_t forward_plain(const Problem& problem, Stream stream) {
  const auto layout = PlainForwardLayout::of<accumulate_t<T>>(problem);
  const PlainSlots slots(layout.bytes, problem.windows);
  if (slots.workspace() > 0 && problem.params.workspace == nullptr) return slots.workspace();
  launch(forward_plain_kernel<T>, Dim3{slots.blocks}, THREADS, slots.shared_bytes(), stream, problem, layout,
         slots);
  return 0;
}

template int64_t forward_plain<double>(const Problem&, Stream);
template int64_t forward_plain<float>(const Problem&, Stream);
template int64_t forward_plain<half_t>(const Problem&, Stream);
template int64_t forward_plain<bfloat16_t>(const Problem&, Stream);

}  // namespace vitkernels::cascaded_group_attention
