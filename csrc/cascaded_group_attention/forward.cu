// Forward of cascaded group attention: the whole mixer in one launch.
//
// Floor per window of N tokens: 2 N C sizeof(T) bytes (x in, out out; the weights stay in L2), and
// 2 (h ((2k + d) d N + k N^2 + d N^2) + k N sum kappa^2 + C^2 N) FLOPs: 118 to 267 FLOPs a byte at the
// models' shapes, the ridge of an H200, so neither may be wasted. Off the tensor cores: h N^2 exponentials
// and k N sum kappa^2 multiply-adds of the depthwise convolution.
//
// A block holds one or more windows and never leaves shared memory between x and out. One buffer Z
// [tokens][C] carries everything: head i's share of x, its input U_i = X_i + O_(i-1), its output O_i, and
// relu(O_i) for the projection take turns in the same columns. Heads run one after another (each needs the
// one before); parallel are the tiles of a product, the windows of a block, and two or more blocks on an SM.
//   rows      The products see the windows' tokens packed (2 windows of 49 are 98 rows, 7 tiles of 16, where
//             one by one they would be 8); only the attention pads each window to whole tiles.
//   weights   All of them pass through each block once, from L2 (18 to 390 KB): the more windows share them
//             the better, as long as the grid still covers a large device twice. Windows are added while a
//             block stays below 72 KB, so that an H100 holds three and an A100 two; beyond that only where a
//             window's share of the weights still outweighs its x and out, up to what every device has (stage
//             3: four images of 16 tokens are 96 KB and read 97 KB of weights each).
//   banks     A row of Z, q, k, v is a multiple of 32 bytes plus 16: ldmatrix is free of conflicts.
#include "plain.h"
#include "tensor.h"

namespace vitkernels::cascaded_group_attention {
namespace {

using tile_attention::Carver;
using tile_attention::Product;
using tile_attention::ProductTile;
using tile_attention::TensorCores;
using tile_attention::Weights;

struct ForwardLayout {
  int count;  // windows of a block
  int rows;   // their tokens, rounded up to 16
  int ld_z, ld_y, ld_q;
  int z, y, q;                 // y: q~, k, v; later a block of columns of the projection
  int x_offsets, out_offsets;  // of each row in the maps, -1 for none
  int y_rows;                  // of each row in y, -1 for none
  int key_codes, table, taps;
  ProductTile tile;
  int64_t bytes;

  ForwardLayout(const Problem& problem, int count, int depth) : count(count) {
    const Params& p = problem.params;
    const int keys = key_rows(problem.tokens),
              widest = p.channels > problem.qkv_rows ? p.channels : problem.qkv_rows;
    rows = round_up(count * problem.tokens, 16);
    tile = ProductTile::choose(rows, THREADS / 32, widest, depth);
    ld_z = leading_dimension<half_t>(p.channels);
    ld_y = leading_dimension<half_t>(problem.qkv_rows);
    ld_q = leading_dimension<half_t>(p.key_dim);
    const int y_elements = count * keys * ld_y, out_elements = rows * (tile.columns() + 8);
    Carver carver;
    x_offsets = carver.take<int64_t>(rows);
    out_offsets = carver.take<int64_t>(rows);
    y_rows = carver.take<int>(rows);
    key_codes = carver.take<int>(keys);
    table = carver.take<float>(BiasCodes(p.window_h, p.window_w).entries);
    taps = carver.take<float>((MAX_KERNEL * MAX_KERNEL + 1) * p.key_dim);
    z = carver.take<half_t>(static_cast<int64_t>(rows) * ld_z);
    y = carver.take<half_t>(y_elements > out_elements ? y_elements : out_elements);
    q = carver.take<half_t>(count * keys * ld_q);
    tile.buffers = carver.take<half_t>(2 * tile.elements);
    bytes = carver.used();
  }
};

// One warp: 16 queries of a window against its keys, to Z.
template <class T, int KEYS>
VK_DEVICE void attend(const Problem& problem, const T* q, int ld_q, const T* k, const T* v, int ld_y, T* out,
                      int ld_out, const int* key_codes, const float* table, int first_query) {
  using Engine = TensorCores<T, KEYS>;
  const int row = first_query + lane_id() / 4, column = lane_id() % 4 * 2, tokens = problem.tokens;
  float p[KEYS / 8][4], factor[2];
  softmax<T, KEYS>(p, factor, problem, q, ld_q, k, ld_y, key_codes, table, first_query);
  VK_NO_UNROLL
  for (int channel = 0; channel < problem.value_dim; channel += 32) {
    const int blocks = problem.value_dim - channel < 32 ? 2 : 4;
    float sums[4][4];
    tile_attention::clear(sums);
    Engine::multiply_registers(sums, p, static_cast<T*>(nullptr), v + channel, ld_y, blocks, {0, tokens});
    VK_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (j >= blocks) break;
      VK_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= tokens) continue;
        Vec<T, 2>{{from_float<T>(sums[j][2 * r] * factor[r]), from_float<T>(sums[j][2 * r + 1] * factor[r])}}
            .store(out + (row + 8 * r) * ld_out + channel + 8 * j + column);
      }
    }
  }
}

// Two blocks on an SM leave 128 registers a thread. The 72 logits of a thread in the largest windows do not
// fit in there beside the rest, and such windows fill the shared memory of an SM sooner anyway.
template <class T, int KEYS>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, (KEYS > 64 ? 1 : 2))
    forward_tensor_kernel(Problem problem, ForwardLayout layout) {
  const Params& params = problem.params;
  char* shared = shared_memory();
  T *z = reinterpret_cast<T*>(shared + layout.z), *y = reinterpret_cast<T*>(shared + layout.y),
    *q = reinterpret_cast<T*>(shared + layout.q);
  auto* x_offsets = reinterpret_cast<int64_t*>(shared + layout.x_offsets);
  auto* out_offsets = reinterpret_cast<int64_t*>(shared + layout.out_offsets);
  auto* y_rows = reinterpret_cast<int*>(shared + layout.y_rows);
  auto* key_codes = reinterpret_cast<int*>(shared + layout.key_codes);
  auto* table = reinterpret_cast<float*>(shared + layout.table);
  auto* taps = reinterpret_cast<float*>(shared + layout.taps);
  Product<T> product(layout.tile, shared);

  const int tokens = problem.tokens, d = problem.value_dim, k = params.key_dim, used = layout.count * tokens;
  const int64_t first_window = static_cast<int64_t>(block_x()) * layout.count;
  const BiasCodes codes(params.window_h, params.window_w);
  const auto qkv_weights = [&](int head) {
    const View& view = params.qkv_weight;
    const int64_t skipped =
        head * view.stride[0] * static_cast<int64_t>(problem.wide_weights ? 4 : sizeof(T));
    return Weights{static_cast<const char*>(view.data) + skipped,
                   view.stride[1],
                   view.stride[2],
                   problem.qkv_rows,
                   d,
                   problem.wide_weights};
  };
  const Weights proj_weights{
      params.proj_weight.data, params.proj_weight.stride[0], params.proj_weight.stride[1], params.channels,
      params.channels,         problem.wide_weights};

  product.template start<true>(qkv_weights(0));
  for (int row = thread_x(); row < layout.rows; row += block_dim_x()) {
    const int window = row / tokens, token = row - window * tokens;
    const bool real = row < used;
    x_offsets[row] = real ? problem.offset(params.x, first_window + window, token) : -1;
    out_offsets[row] = real ? problem.offset(params.out, first_window + window, token) : -1;
    y_rows[row] = real ? window * KEYS + token : -1;
  }
  for (int slot = thread_x(); slot < KEYS; slot += block_dim_x())
    key_codes[slot] = slot < tokens ? codes.code(slot) : INVALID;
  for (int i = thread_x(); i < layout.count * (KEYS - tokens) * layout.ld_y / 8; i += block_dim_x()) {
    const int row = i * 8 / layout.ld_y, column = i * 8 % layout.ld_y;
    zeros<T>().store(y + (row / (KEYS - tokens) * KEYS + tokens + row % (KEYS - tokens)) * layout.ld_y +
                     column);
  }
  sync_block();

  const auto x_channels = Channels::of<T>(params.x);
  const Walk x_walk(layout.rows, params.channels, params.x);
  VK_NO_UNROLL
  for (int i = thread_x(); i < x_walk.visits(); i += block_dim_x()) {
    const int row = x_walk.row(i), channel = x_walk.channel(i);
    const int64_t offset = x_offsets[row];
    const T* source =
        static_cast<const T*>(params.x.data) + (offset < 0 ? 0 : offset) + channel * x_channels.stride;
    T* target = z + row * layout.ld_z + channel;
    if (x_channels.vectorized) {
      cp_async16(target, source, offset >= 0);
    } else {
      (offset < 0 ? zeros<T>() : x_channels.load(source)).store(target);
    }
  }
  cp_async_commit();

  VK_NO_UNROLL
  for (int head = 0; head < params.num_heads; ++head) {
    const View& bias = params.qkv_bias;
    product.template run<true>(
        z + head * d, layout.ld_z, layout.rows, qkv_weights(head),
        [&](int row, int n, int offset, float first, float second) {
          if (y_rows[row] < 0) return;
          const int column = n + offset;
          const int64_t at = head * bias.stride[0] + column * bias.stride[1];
          first += read<T>(bias, problem.wide_weights, at);
          second += read<T>(bias, problem.wide_weights, at + bias.stride[1]);
          Vec<T, 2>{{from_float<T>(first), from_float<T>(second)}}.store(y + y_rows[row] * layout.ld_y +
                                                                         column);
        },
        [](int, int) {});
    // The next weights travel during the rest of this head.
    product.template start<true>(head + 1 < params.num_heads ? qkv_weights(head + 1) : proj_weights);
    codes.stage<T>(table, problem, head);
    stage_taps<T>(taps, problem, head, false);
    sync_block();
    convolve(y, layout.ld_y, q, layout.ld_q, taps, problem, head, layout.count, KEYS);
    sync_block();

    const int query_tiles = (tokens + 15) / 16;
    VK_NO_UNROLL
    for (int task = warp_id(); task < layout.count * query_tiles; task += block_dim_x() / 32) {
      const int window = task / query_tiles, tile = task % query_tiles;
      const T* rows = y + window * KEYS * layout.ld_y;
      attend<T, KEYS>(problem, q + window * KEYS * layout.ld_q, layout.ld_q, rows + k, rows + 2 * k,
                      layout.ld_y, z + window * tokens * layout.ld_z + head * d, layout.ld_z, key_codes,
                      table, 16 * tile);
    }
    sync_block();

    const auto head_channels = Channels::of_heads<T>(params.heads);
    VK_NO_UNROLL
    for (int i = thread_x(); i < used * (d / 8); i += block_dim_x()) {
      const int row = i / (d / 8), channel = head * d + i % (d / 8) * 8;
      T* here = z + row * layout.ld_z + channel;
      auto output = Vec<T, 8>::load(here);
      const int64_t window = first_window + row / tokens;
      if (present(params.heads) && window < problem.windows)
        head_channels.store(static_cast<T*>(params.heads.data) +
                                Problem::heads_offset(params.heads, window, row % tokens) +
                                channel * head_channels.stride,
                            output);
      if (head + 1 < params.num_heads) {
        auto next = Vec<T, 8>::load(here + d);
        VK_UNROLL
        for (int e = 0; e < 8; ++e) next[e] = from_float<T>(to_float(output[e]) + to_float(next[e]));
        next.store(here + d);
      }
      VK_UNROLL
      for (int e = 0; e < 8; ++e) output[e] = from_float<T>(relu(to_float(output[e])));
      output.store(here);
    }
  }

  const int ld_out = layout.tile.columns() + 8;
  const auto out_channels = Channels::of<T>(params.out);
  const View& bias = params.proj_bias;
  product.template run<true>(
      z, layout.ld_z, layout.rows, proj_weights,
      [&](int row, int n, int column, float first, float second) {
        first += read<T>(bias, problem.wide_weights, (n + column) * bias.stride[0]);
        second += read<T>(bias, problem.wide_weights, (n + column + 1) * bias.stride[0]);
        Vec<T, 2>{{from_float<T>(first), from_float<T>(second)}}.store(y + row * ld_out + column);
      },
      [&](int first_column, int columns) {
        sync_block();
        const Walk walk(layout.rows, columns, params.out);
        VK_NO_UNROLL
        for (int i = thread_x(); i < walk.visits(); i += block_dim_x()) {
          const int row = walk.row(i), channel = walk.channel(i);
          if (out_offsets[row] < 0) continue;
          auto values = Vec<T, 8>::load(y + row * ld_out + channel);
          if (params.residual) {
            const auto x = x_channels.load(static_cast<const T*>(params.x.data) + x_offsets[row] +
                                           (first_column + channel) * x_channels.stride);
            VK_UNROLL
            for (int e = 0; e < 8; ++e) values[e] = from_float<T>(to_float(x[e]) + to_float(values[e]));
          }
          out_channels.store(static_cast<T*>(params.out.data) + out_offsets[row] +
                                 (first_column + channel) * out_channels.stride,
                             values);
        }
      });
}

// The windows of a block, 0 when not even one fits, and the depth of the tiles of weights.
int fitting_windows(const Problem& problem, int* depth) {
  constexpr int64_t COMFORTABLE = 72 * 1024;
  const int64_t spread = problem.windows / (2 * 132), channels = problem.params.channels;
  const int64_t weights = channels * (channels + problem.qkv_rows),
                activations = 2 * problem.tokens * channels;
  int best = 0;
  for (int count = 1; count == 1 || (count <= spread && count * problem.tokens <= 128); ++count) {
    const bool heavy = count == 1 || weights / (count - 1) > activations;
    const int64_t limit = heavy ? tile_attention::SHARED_LIMIT : COMFORTABLE;
    const int deepest = ForwardLayout(problem, count, 64).bytes <= limit ? 64 : 32;
    if (ForwardLayout(problem, count, deepest).bytes > limit) break;
    best = count;
    *depth = deepest;
  }
  return best;
}

template <class T>
bool forward_tensor(const Problem& problem, Stream stream) {
  if (!suits_tensor_cores(problem.params)) return false;
  int depth = 0;
  const int count = fitting_windows(problem, &depth);
  if (count == 0) return false;
  const ForwardLayout layout(problem, count, depth);
  const Dim3 grid{(problem.windows + count - 1) / count};
  const auto bytes = static_cast<size_t>(layout.bytes);
  switch (key_rows(problem.tokens)) {
    case 16:
      launch(forward_tensor_kernel<T, 16>, grid, THREADS, bytes, stream, problem, layout);
      break;
    case 64:
      launch(forward_tensor_kernel<T, 64>, grid, THREADS, bytes, stream, problem, layout);
      break;
    default:
      launch(forward_tensor_kernel<T, MAX_TOKENS>, grid, THREADS, bytes, stream, problem, layout);
  }
  return true;
}

}  // namespace

int64_t forward_cuda(const Params& params, Stream stream) {
  const Problem problem(params);
  return with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (forward_tensor<T>(problem, stream)) return int64_t{0};
    }
    return forward_plain<T>(problem, stream);
  });
}

}  // namespace vitkernels::cascaded_group_attention
