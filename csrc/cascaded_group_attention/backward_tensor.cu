// The window kernel of the backward on tensor cores.
//
// Floor per window: 2 h (2 (2k + d) d N + 3 k N^2 + 2 d N^2) FLOPs, q~, k, v and P recomputed; bytes: x,
// heads, grad_z and grad_x, C elements a token each, and grad_y, h (2k + d). Bound by neither: between its
// barriers a block has too little work of one kind, so what counts is a second block on the SM.
//
// Every window takes KEYS rows, zero from its last token on, so that products over tokens need no mask. U, q~
// k v, q, grad_o, grad_y and grad_q of one head fit 90 KB up to 96 channels a head; the weights' tiles take
// turns with P and D, the gradient of the logits. What the projection passes down is there already, see
// backward_projection.cu.
#include "window_sums.h"

namespace vitkernels::cascaded_group_attention {
namespace {

using tile_attention::Carver;
using tile_attention::Product;
using tile_attention::ProductTile;
using tile_attention::SHARED_LIMIT;
using tile_attention::TensorCores;
using tile_attention::Weights;

constexpr int WARPS = THREADS / 32;

struct WindowLayout {
  int count;  // windows at a time
  int rows;   // count x KEYS
  int ld_d, ld_y, ld_k, ld_n;
  int x_offsets, grad_x_offsets, grad_out_offsets;  // of each row in the maps, -1 for none
  int key_codes, table, entry_sums, taps, reversed_taps;
  int u, y, q, grad_o, grad_y, grad_q;
  int p, d;  // one after another; the tiles of the weights take turns with both
  ProductTile tile;
  int64_t bytes;

  WindowLayout(const Problem& problem, int count) : count(count) {
    const Params& params = problem.params;
    const int keys = key_rows(problem.tokens), entries = BiasCodes(params.window_h, params.window_w).entries;
    const int tap_elements = (MAX_KERNEL * MAX_KERNEL + 1) * params.key_dim;
    rows = count * keys;
    ld_d = leading_dimension<half_t>(problem.value_dim);
    ld_y = leading_dimension<half_t>(problem.qkv_rows);
    ld_k = leading_dimension<half_t>(params.key_dim);
    ld_n = leading_dimension<half_t>(keys);
    tile = ProductTile::choose(rows, WARPS, problem.qkv_rows, 32);
    Carver carver;
    x_offsets = carver.take<int64_t>(rows);
    grad_x_offsets = carver.take<int64_t>(rows);
    grad_out_offsets = carver.take<int64_t>(rows);
    key_codes = carver.take<int>(keys);
    table = carver.take<float>(entries);
    entry_sums = carver.take<float>(entries);
    taps = carver.take<float>(tap_elements);
    reversed_taps = carver.take<float>(tap_elements);
    u = carver.take<half_t>(rows * ld_d);
    y = carver.take<half_t>(rows * ld_y);
    q = carver.take<half_t>(rows * ld_k);
    grad_o = carver.take<half_t>(rows * ld_d);
    grad_y = carver.take<half_t>(rows * ld_y);
    grad_q = carver.take<half_t>(rows * ld_k);
    const int pair = 2 * rows * ld_n;
    p = carver.take<half_t>(pair > 2 * tile.elements ? pair : 2 * tile.elements);
    d = p + rows * ld_n * static_cast<int>(sizeof(half_t));
    tile.buffers = p;
    bytes = carver.used();
  }
};

// Blocks that share the windows: enough to fill a large device twice, beyond that a block keeps its sums.
int64_t window_blocks(const Problem& problem, int count) {
  constexpr int64_t MOST = 264;
  const int64_t groups = (problem.windows + count - 1) / count;
  return groups < MOST ? groups : MOST;
}

// The windows that a block takes at a time; 0 when not one fits.
int fitting_windows(const Problem& problem) {
  if (!suits_tensor_cores(problem.params) || problem.tokens > 64 || !projection_fits(problem)) return 0;
  const int rows = key_rows(problem.tokens);
  for (int count = 64 / rows; count >= 1; --count) {
    if (WindowLayout(problem, count).bytes <= SHARED_LIMIT) return count;
  }
  return 0;
}

// One warp: P and D = P * (grad_o v^T - delta) for 16 queries of a window, zero where there is no query or no
// key. Whole rows of P are at hand, so delta is the sum of P * (grad_o v^T), and the heads' rounding is not
// inherited.
template <class T, int KEYS>
VK_DEVICE void probabilities(const Problem& problem, const T* q, int ld_q, const T* k, const T* v, int ld_y,
                             const T* grad_o, int ld_o, const int* key_codes, const float* table, T* p_tile,
                             T* d_tile, int ld, int first_query) {
  using Engine = TensorCores<T, KEYS>;
  const int row = first_query + lane_id() / 4, tokens = problem.tokens;
  float p[KEYS / 8][4], factor[2];
  softmax<T, KEYS>(p, factor, problem, q, ld_q, k, ld_y, key_codes, table, first_query);
  const bool real[2] = {row < tokens, row + 8 < tokens};
  VK_UNROLL
  for (int j = 0; j < KEYS / 8; ++j) {
    VK_UNROLL
    for (int c = 0; c < 4; ++c) p[j][c] = real[c / 2] ? p[j][c] * factor[c / 2] : 0.0f;
  }
  tile_attention::write_sums(p_tile + first_query * ld, ld, p, KEYS / 8, 1.0f, 1.0f);

  float d[KEYS / 8][4];
  tile_attention::clear(d);
  Engine::multiply_rows(d, grad_o + first_query * ld_o, ld_o, v, ld_y, problem.value_dim, {0, tokens});
  float delta[2] = {0.0f, 0.0f};
  VK_UNROLL
  for (int j = 0; j < KEYS / 8; ++j) {
    VK_UNROLL
    for (int c = 0; c < 4; ++c) delta[c / 2] += p[j][c] * d[j][c];
  }
  VK_UNROLL
  for (int r = 0; r < 2; ++r) delta[r] = warp_sum<4>(delta[r]);
  VK_UNROLL
  for (int j = 0; j < KEYS / 8; ++j) {
    VK_UNROLL
    for (int c = 0; c < 4; ++c) d[j][c] = p[j][c] * (d[j][c] - delta[c / 2]);
  }
  tile_attention::write_sums(d_tile + first_query * ld, ld, d, KEYS / 8, 1.0f, 1.0f);
}

// out = factor a b over the KEYS rows of each window (a transposed or not), 16 rows by 32 columns a warp;
// `first_task` staggers several products over the warps. Returns the tasks.
template <class T, int KEYS, bool TRANSPOSED>
VK_DEVICE int multiply_windows(const T* a, int lda, const T* b, int ldb, T* out, int ld_out, int columns,
                               float factor, int count, int first_task) {
  constexpr int TILES = KEYS / 16;
  const int groups = (columns + 31) / 32, tasks = count * TILES * groups;
  int task = (warp_id() - first_task % WARPS + WARPS) % WARPS;
  VK_NO_UNROLL
  for (; task < tasks; task += WARPS) {
    const int group = task % groups, tile = task / groups % TILES, base = task / groups / TILES * KEYS;
    const int column = group * 32, blocks = columns - column < 32 ? 2 : 4;
    float sums[4][4];
    tile_attention::clear(sums);
    TensorCores<T, KEYS>::template multiply<TRANSPOSED>(
        sums, a + base * lda + (TRANSPOSED ? 16 * tile : 16 * tile * lda), lda, b + base * ldb + column, ldb,
        blocks, {0, KEYS});
    tile_attention::write_sums(out + (base + 16 * tile) * ld_out + column, ld_out, sums, blocks, factor,
                               factor);
  }
  return tasks;
}

template <class T, int KEYS>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 2)
    backward_windows_tensor_kernel(Problem problem, WindowLayout layout, WindowSums places,
                                   const T* all_grad_z, T* all_grad_y, float* all_sums) {
  const Params& params = problem.params;
  char* shared = shared_memory();
  const auto tile = [&](int offset) { return reinterpret_cast<T*>(shared + offset); };
  const auto floats = [&](int offset) { return reinterpret_cast<float*>(shared + offset); };
  const auto places_of = [&](int offset) { return reinterpret_cast<int64_t*>(shared + offset); };
  T *u = tile(layout.u), *y = tile(layout.y), *q = tile(layout.q), *grad_o = tile(layout.grad_o),
    *grad_y = tile(layout.grad_y), *grad_q = tile(layout.grad_q), *p = tile(layout.p), *d = tile(layout.d);
  auto* key_codes = reinterpret_cast<int*>(shared + layout.key_codes);
  float *table = floats(layout.table), *entry_sums = floats(layout.entry_sums), *taps = floats(layout.taps),
        *reversed_taps = floats(layout.reversed_taps);
  int64_t *x_offsets = places_of(layout.x_offsets), *grad_x_offsets = places_of(layout.grad_x_offsets),
          *grad_out_offsets = places_of(layout.grad_out_offsets);
  Product<T> product(layout.tile, shared);

  const int tokens = problem.tokens, width = problem.value_dim, k = params.key_dim, rows = layout.rows;
  const int outputs = problem.qkv_rows, chunks = width / 8, ld_d = layout.ld_d, ld_y = layout.ld_y,
            ld_k = layout.ld_k, ld_n = layout.ld_n;
  const float scale = static_cast<float>(params.scale);
  const BiasCodes codes(params.window_h, params.window_w);
  const View &weight = params.qkv_weight, &bias = params.qkv_bias;
  const auto weights = [&](int head) {
    const int64_t skipped =
        head * weight.stride[0] * static_cast<int64_t>(problem.wide_weights ? 4 : sizeof(T));
    return Weights{static_cast<const char*>(weight.data) + skipped,
                   weight.stride[1],
                   weight.stride[2],
                   outputs,
                   width,
                   problem.wide_weights};
  };
  for (int slot = thread_x(); slot < KEYS; slot += block_dim_x())
    key_codes[slot] = slot < tokens ? codes.code(slot) : INVALID;
  // Rows without a token stay zero throughout. The convolutions leave them alone, so that theirs are set
  // here.
  for (int i = thread_x(); i < rows * ld_y / 8; i += block_dim_x()) zeros<T>().store(grad_y + 8 * i);
  for (int i = thread_x(); i < rows * ld_k / 8; i += block_dim_x()) zeros<T>().store(q + 8 * i);

  const int windows = static_cast<int>(problem.windows);
  const int step = grid_x() * layout.count;
  for (int first_window = block_x() * layout.count; first_window < windows; first_window += step) {
    const auto window_of = [&](int row) -> int64_t { return first_window + row / KEYS; };
    const auto exists = [&](int row) { return row % KEYS < tokens && first_window + row / KEYS < windows; };
    for (int row = thread_x(); row < rows; row += block_dim_x()) {
      const auto offset = [&](const View& map) {
        return present(map) && exists(row) ? problem.offset(map, window_of(row), row % KEYS) : -1;
      };
      x_offsets[row] = offset(params.x);
      grad_x_offsets[row] = offset(params.grad_x);
      grad_out_offsets[row] = offset(params.grad_out);
    }
    sync_block();

    VK_NO_UNROLL
    for (int head = params.num_heads - 1; head >= 0; --head) {
      product.template start<true>(weights(head));
      codes.stage<T>(table, problem, head);
      stage_taps<T>(taps, problem, head, false);
      stage_taps<T>(reversed_taps, problem, head, true);
      const auto x_channels = Channels::of<T>(params.x), head_channels = Channels::of_heads<T>(params.heads);
      const Walk walk(rows, width, params.x);
      VK_NO_UNROLL
      for (int i = thread_x(); i < walk.visits(); i += block_dim_x()) {
        const int row = walk.row(i), channel = head * width + walk.channel(i);
        const int64_t offset = x_offsets[row];
        auto values = zeros<T>();
        if (offset >= 0)
          values =
              x_channels.load(static_cast<const T*>(params.x.data) + offset + channel * x_channels.stride);
        if (head > 0 && exists(row)) {
          const auto* source = static_cast<const T*>(params.heads.data) +
                               Problem::heads_offset(params.heads, window_of(row), row % KEYS) +
                               (channel - width) * head_channels.stride;
          const auto previous = head_channels.load(source);
          VK_UNROLL
          for (int e = 0; e < 8; ++e) values[e] = from_float<T>(to_float(previous[e]) + to_float(values[e]));
        }
        values.store(u + row * ld_d + walk.channel(i));
      }
      // grad_o still holds the gradient of the next head's input, which is part of this head's output.
      VK_NO_UNROLL
      for (int i = thread_x(); i < rows * chunks; i += block_dim_x()) {
        const int row = i / chunks, channel = i % chunks * 8;
        auto values = zeros<T>();
        if (exists(row)) {
          const int64_t token = window_of(row) * tokens + row % KEYS;
          values = Vec<T, 8>::load(all_grad_z + token * params.channels + head * width + channel);
          if (head + 1 < params.num_heads) {
            const auto passed = Vec<T, 8>::load(grad_o + row * ld_d + channel);
            VK_UNROLL
            for (int e = 0; e < 8; ++e) values[e] = from_float<T>(to_float(passed[e]) + to_float(values[e]));
          }
        }
        values.store(grad_o + row * ld_d + channel);
      }
      product.template run<true>(
          u, ld_d, rows, weights(head),
          [&](int row, int n, int offset, float first, float second) {
            const int column = n + offset;
            const int64_t at = head * bias.stride[0] + column * bias.stride[1];
            const bool real = row % KEYS < tokens;
            first = real ? first + read<T>(bias, problem.wide_weights, at) : 0.0f;
            second = real ? second + read<T>(bias, problem.wide_weights, at + bias.stride[1]) : 0.0f;
            Vec<T, 2>{{from_float<T>(first), from_float<T>(second)}}.store(y + row * ld_y + column);
          },
          [](int, int) {});
      sync_block();
      convolve(y, ld_y, q, ld_k, taps, problem, head, layout.count, KEYS);
      sync_block();
      constexpr int TILES = KEYS / 16;
      VK_NO_UNROLL
      for (int task = warp_id(); task < layout.count * TILES; task += WARPS) {
        const int base = task / TILES * KEYS;
        const T* window_y = y + base * ld_y;
        probabilities<T, KEYS>(problem, q + base * ld_k, ld_k, window_y + k, window_y + 2 * k, ld_y,
                               grad_o + base * ld_d, ld_d, key_codes, table, p + base * ld_n, d + base * ld_n,
                               ld_n, task % TILES * 16);
      }
      sync_block();
      int tasks = multiply_windows<T, KEYS, true>(p, ld_n, grad_o, ld_d, grad_y + 2 * k, ld_y, width, 1.0f,
                                                  layout.count, 0);
      tasks +=
          multiply_windows<T, KEYS, true>(d, ld_n, q, ld_k, grad_y + k, ld_y, k, scale, layout.count, tasks);
      multiply_windows<T, KEYS, false>(d, ld_n, y + k, ld_y, grad_q, ld_k, k, scale, layout.count, tasks);
      sum_entries(problem, d, ld_n, layout.count, KEYS, entry_sums);
      sync_block();
      // P and D are through, their memory is the weights' again.
      const bool passes = head > 0 || present(params.grad_x);
      if (passes) product.template start<false>(weights(head));
      convolve(grad_q, ld_k, grad_y, ld_y, reversed_taps, problem, head, layout.count, KEYS);
      add_window_sums(problem, places, all_sums + block_x() * places.elements,
                      first_window == block_x() * layout.count, head, entry_sums, y, ld_y, grad_q, ld_k,
                      layout.count, KEYS);
      sync_block();
      VK_NO_UNROLL
      for (int i = thread_x(); i < rows * (outputs / 8); i += block_dim_x()) {
        const int row = i / (outputs / 8), column = i % (outputs / 8) * 8;
        if (!exists(row)) continue;
        const int64_t token = window_of(row) * tokens + row % KEYS;
        Vec<T, 8>::load(grad_y + row * ld_y + column)
            .store(all_grad_y + (token * params.num_heads + head) * outputs + column);
      }
      if (passes) {
        product.template run<false>(
            grad_y, ld_y, rows, weights(head),
            [&](int row, int n, int offset, float first, float second) {
              Vec<T, 2>{{from_float<T>(first), from_float<T>(second)}}.store(grad_o + row * ld_d + n +
                                                                             offset);
            },
            [](int, int) {});
      }
      sync_block();
      if (!present(params.grad_x)) continue;
      const auto grad_x_channels = Channels::of<T>(params.grad_x),
                 grad_out_channels = Channels::of<T>(params.grad_out);
      const Walk target_walk(rows, width, params.grad_x);
      VK_NO_UNROLL
      for (int i = thread_x(); i < target_walk.visits(); i += block_dim_x()) {
        const int row = target_walk.row(i), channel = head * width + target_walk.channel(i);
        if (grad_x_offsets[row] < 0) continue;
        auto values = Vec<T, 8>::load(grad_o + row * ld_d + target_walk.channel(i));
        if (params.residual && present(params.grad_out)) {
          const auto skipped =
              grad_out_channels.load(static_cast<const T*>(params.grad_out.data) + grad_out_offsets[row] +
                                     channel * grad_out_channels.stride);
          VK_UNROLL
          for (int e = 0; e < 8; ++e) values[e] = from_float<T>(to_float(skipped[e]) + to_float(values[e]));
        }
        grad_x_channels.store(
            static_cast<T*>(params.grad_x.data) + grad_x_offsets[row] + channel * grad_x_channels.stride,
            values);
      }
      sync_block();  // before the next head changes grad_o
    }
    sync_block();  // before the next windows' offsets
  }
}

}  // namespace

int64_t backward_blocks_tensor(const Problem& problem) {
  const int count = fitting_windows(problem);
  return count == 0 ? 0 : window_blocks(problem, count);
}

template <class T>
void backward_windows_tensor(const Problem& problem, const Workspace& workspace, Stream stream) {
  const WindowLayout layout(problem, fitting_windows(problem));
  char* base = static_cast<char*>(problem.params.workspace);
  T *grad_z = reinterpret_cast<T*>(base + workspace.grad_z),
    *grad_y = reinterpret_cast<T*>(base + workspace.grad_y);
  auto* sums = reinterpret_cast<float*>(base + workspace.window_sums);
  backward_projection<T>(problem, grad_z, stream);
  const Dim3 grid{workspace.blocks};
  const auto bytes = static_cast<size_t>(layout.bytes);
  const WindowSums places(problem);
  if (key_rows(problem.tokens) == 16) {
    launch(backward_windows_tensor_kernel<T, 16>, grid, THREADS, bytes, stream, problem, layout, places,
           grad_z, grad_y, sums);
  } else {
    launch(backward_windows_tensor_kernel<T, 64>, grid, THREADS, bytes, stream, problem, layout, places,
           grad_z, grad_y, sums);
  }
}

template void backward_windows_tensor<half_t>(const Problem&, const Workspace&, Stream);
template void backward_windows_tensor<bfloat16_t>(const Problem&, const Workspace&, Stream);

}  // namespace vitkernels::cascaded_group_attention
