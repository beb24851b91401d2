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
// one before), so a small batch is bound by the latency of this chain, and so is a large one between its
// barriers:
//   steps     Three barriers a head: q~, k, v; the depthwise convolution; attention, whose warps leave
//             relu(O) and the next head's U where they are needed. Queries have more warps than tiles: those
//             of a tile share the channels of v and each repeat its logits.
//   loads     Biases, taps and tables of all heads are in shared memory from the start, x and they by loads
//             that are in flight together. Weights go from L2 to registers, see row_product.h.
//   warps     16 where a block has an SM to itself; 8 otherwise, two and more blocks on an SM.
//   rows      The products see the windows' tokens packed (2 windows of 49 are 98 rows, 7 tiles of 16, where
//             one by one they would be 8); only the attention pads each window to whole tiles.
//   weights   All of them pass through each block, from L2 (18 to 390 KB): the more windows share them the
//             better, as long as the grid still covers a large device twice. Windows are added while a
//             block stays below 72 KB, so that an H100 holds three and an A100 two; beyond that only where a
//             window's share of the weights still outweighs its x and out, up to what every device has.
//   banks     A row of q, k, v is a multiple of 32 bytes plus 16: ldmatrix is free of conflicts. Z: see Rows.
#include "constants.h"
#include "plain.h"
#include "row_product.h"
#include "shape_weights.h"

namespace vitkernels::cascaded_group_attention {
namespace {

using tile_attention::Carver;
using tile_attention::TensorCores;

constexpr int MOST_THREADS = 512;
// Tiles of a warp's sums in the projection, 16 rows and 8 columns each.
constexpr int OUT_TILES_DOWN = 4, OUT_TILES_ACROSS = 3;

struct ForwardLayout {
  int threads;
  int count;     // windows of a block
  int rows;      // their tokens, rounded up to 16
  int row_bits;  // of a power of two that holds the rows
  int blocks;    // of 32 channels of a head in z
  int ld_z, ld_y, ld_q;
  int z, y, q;                 // y: q~, k, v
  int x_offsets, out_offsets;  // of each row in the maps, -1 for none
  int y_rows;                  // of each row in y, -1 for none
  int key_codes;
  int slices, slice;  // of the channels of a head, among the warps that attend to the same queries
  int out_rows;       // that a warp projects at a time
  Divisor by_tile, by_slice, by_blocks, by_chunk;
  ConstantLayout constants;
  int64_t bytes;

  ForwardLayout(const Problem& problem, int count, int threads, int sets)
      : ForwardLayout(problem, count, threads, sets, Carver()) {}

 private:
  ForwardLayout(const Problem& problem, int count, int threads, int sets, Carver carver)
      : threads(threads), count(count), constants(problem, sets, carver) {
    const Params& p = problem.params;
    const int keys = key_rows(problem.tokens), tiles = (problem.tokens + 15) / 16;
    rows = round_up(count * problem.tokens, 16);
    row_bits = 4;
    while (1 << row_bits < rows) ++row_bits;
    blocks = (problem.value_dim + 31) / 32;
    by_blocks = Divisor(blocks);
    by_chunk = Divisor(4 * blocks);
    ld_z = Rows<half_t>::leading_dimension(p.num_heads * blocks);
    ld_y = leading_dimension<half_t>(problem.qkv_rows);
    ld_q = leading_dimension<half_t>(p.key_dim);
    const int parts = problem.value_dim / 16, wanted = threads / 32 / (count * tiles);
    const int share = wanted < 1 ? parts : (parts + wanted - 1) / wanted;
    slice = share == 1 ? 16 : round_up(16 * share, 32);
    slices = (problem.value_dim + slice - 1) / slice;
    out_rows = rows_to_project(p.channels);
    by_tile = Divisor(tiles);
    by_slice = Divisor(slices);
    x_offsets = carver.take<int64_t>(rows);
    out_offsets = carver.take<int64_t>(rows);
    y_rows = carver.take<int>(rows);
    key_codes = carver.take<int>(keys);
    z = carver.take<half_t>(static_cast<int64_t>(rows) * ld_z);
    y = carver.take<half_t>(count * keys * ld_y);
    q = carver.take<half_t>(count * keys * ld_q);
    bytes = carver.used();
  }

  // As many as share a weight in registers, or fewer where that leaves warps without work. A piece of work
  // takes as long as its rows and about 16 more.
  int rows_to_project(int channels) const {
    const int across = (channels + 8 * OUT_TILES_ACROSS - 1) / (8 * OUT_TILES_ACROSS), warps = threads / 32;
    const auto time = [&](int down) {
      return (((rows + down - 1) / down * across + warps - 1) / warps) * (down + 16);
    };
    int best = 16 * OUT_TILES_DOWN;
    for (int down = best / 2; down >= 16; down /= 2)
      if (time(down) < time(best)) best = down;
    return best;
  }
};

// How the threads of a block share a map: each has a row of its own and every `step`-th chunk of 8 channels
// from `chunk` on, neighbours four chunks of eight rows where there are enough of them: whole sectors of a
// map whose channels are dense, half ones of one whose tokens are, and no conflicts between banks.
struct Share {
  int row, chunk, step;

  VK_DEVICE explicit Share(int row_bits) {
    const int low = (4 << row_bits) <= block_dim_x() ? 2 : (2 << row_bits) <= block_dim_x() ? 1 : 0;
    row = (thread_x() >> low) & ((1 << row_bits) - 1);
    chunk = (thread_x() & ((1 << low) - 1)) + ((thread_x() >> (low + row_bits)) << low);
    step = block_dim_x() >> row_bits;
  }
};

// x of a row to z; zeros where there is no token or no channel. A thread's loads are in flight together,
// three chunks of them.
template <class T>
VK_DEVICE void load_row(const Rows<T>& z, const View& x, const Share& share, int64_t offset, int chunks,
                        const Divisor& by_chunk) {
  constexpr int IN_FLIGHT = 3;
  const auto x_channels = Channels::of<T>(x);
  const T* source = static_cast<const T*>(x.data) + (offset < 0 ? 0 : offset);
  VK_NO_UNROLL
  for (int chunk = share.chunk; chunk < chunks; chunk += IN_FLIGHT * share.step) {
    Vec<T, 8> values[IN_FLIGHT];
    VK_UNROLL
    for (int u = 0; u < IN_FLIGHT; ++u) {
      const int here = chunk + u * share.step, head = by_chunk.divide(here);
      const int within = 8 * (here - head * by_chunk.value());
      const bool exists = offset >= 0 && here < chunks && within < z.depth;
      const T* first = source + (head * z.depth + within) * x_channels.stride;
      values[u] = zeros<T>();
      if (exists) values[u] = x_channels.load(first);
    }
    VK_UNROLL
    for (int u = 0; u < IN_FLIGHT; ++u) {
      const int here = chunk + u * share.step;
      if (here >= chunks) break;
      VK_UNROLL
      for (int q = 0; q < 4; ++q)
        Vec<T, 2>{{values[u][2 * q], values[u][2 * q + 1]}}.store(z.quarter(share.row, here / 4, q) +
                                                                  here % 4 * 2);
    }
  }
}

// The sums of a warp take turns at the place of the first ones: what becomes of them is one piece of code
// that runs several times, not several that each run once and have to be fetched for it. Moves by two
// numbers.
template <int M, int N>
VK_DEVICE void next_row(float (&sums)[M][N][4]) {
  VK_UNROLL
  for (int j = 0; j < N; ++j) {
    VK_UNROLL
    for (int i = 0; i + 1 < 2 * M; ++i) {
      VK_UNROLL
      for (int c = 0; c < 2; ++c) sums[i / 2][j][i % 2 * 2 + c] = sums[(i + 1) / 2][j][(i + 1) % 2 * 2 + c];
    }
  }
}

// One warp: 16 queries of a window against its keys, the channels of v from `first` to `last`.
// output(query, channel, pairs of O): of the channels channel, channel + 1, channel + 8 and channel + 9.
template <class T, int KEYS, class Output>
VK_DEVICE void attend(const Problem& problem, const T* q, int ld_q, const T* k, const T* v, int ld_y,
                      const int* key_codes, const float* table, int first_query, int first, int last,
                      Output output) {
  using Engine = TensorCores<T, KEYS>;
  const int row = first_query + lane_id() / 4, column = lane_id() % 4 * 2, tokens = problem.tokens;
  float p[KEYS / 8][4], factor[2];
  softmax<T, KEYS>(p, factor, problem, q, ld_q, k, ld_y, key_codes, table, first_query);
  VK_NO_UNROLL
  for (int channel = first; channel < last; channel += 32) {
    const int blocks = last - channel < 32 ? 2 : 4;
    float sums[4][4];
    tile_attention::clear(sums);
    Engine::multiply_registers(sums, p, static_cast<T*>(nullptr), v + channel, ld_y, blocks, {0, tokens});
    float pairs[2][2][4];  // of tiles
    VK_UNROLL
    for (int i = 0; i < 4; ++i) {
      VK_UNROLL
      for (int c = 0; c < 4; ++c) pairs[i / 2][i % 2][c] = sums[i][c] * factor[c / 2];
    }
    VK_NO_UNROLL
    for (int i = 0; i < blocks; ++i) {
      const int query = row + i % 2 * 8;
      if (query < tokens) {
        Vec<T, 4> values;
        VK_UNROLL
        for (int e = 0; e < 4; ++e) values[e] = from_float<T>(pairs[0][e / 2][e % 2]);
        output(query, channel + i / 2 * 16 + column, values);
      }
      next_row(pairs);
    }
  }
}

// Channels of a map whose stride is less than 2^31 bytes: one multiplication each.
struct Steps {
  int stride;

  VK_DEVICE explicit Steps(const View& map) : stride(static_cast<int>(map.stride[1])) {}
  template <class T>
  VK_DEVICE T* to(T* first, int channel) const {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(first) +
                                static_cast<int64_t>(channel) * (stride * static_cast<int>(sizeof(T))));
  }
};

// Sums of the projection with their bias, rounded, after x where that is asked for, to out. Lanes are
// neighbours along the tokens or four along the channels.
template <class T, int WIDTH, int M, int N>
VK_DEVICE void write_out(const Params& params, float (&sums)[M][N][4], int row, int last_row, int column,
                         const float* bias, const int64_t* x_offsets, const int64_t* out_offsets) {
  constexpr int PIECES = 2 / WIDTH;
  using Piece = Vec<T, WIDTH>;
  const int g = lane_id() / 4, channel = column + lane_id() % 4 * 2;
  const Steps x_steps(params.x), out_steps(params.out);
  const T* x = x_steps.to(static_cast<const T*>(params.x.data), channel);
  T* out = out_steps.to(static_cast<T*>(params.out.data), channel);
  VK_NO_UNROLL
  for (int m = 0; m < M; ++m) {
    if (row + 16 * m >= last_row) break;
    Piece inputs[2][N][PIECES];
    if (params.residual) {
      VK_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int64_t from = x_offsets[row + 16 * m + 8 * r + g];
        if (from < 0) continue;
        VK_UNROLL
        for (int j = 0; j < N; ++j) {
          if (column + 8 * j >= params.channels) break;
          VK_UNROLL
          for (int c = 0; c < PIECES; ++c) inputs[r][j][c] = Piece::load(x_steps.to(x + from, 8 * j + c));
        }
      }
    }
    VK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int64_t to = out_offsets[row + 16 * m + 8 * r + g];
      if (to < 0) continue;
      VK_UNROLL
      for (int j = 0; j < N; ++j) {
        if (column + 8 * j >= params.channels) break;
        VK_UNROLL
        for (int c = 0; c < PIECES; ++c) {
          Piece values;
          VK_UNROLL
          for (int e = 0; e < WIDTH; ++e) {
            values[e] = from_float<T>(sums[0][j][2 * r + c + e] + bias[channel + 8 * j + c + e]);
            if (params.residual)
              values[e] = from_float<T>(to_float(inputs[r][j][c][e]) + to_float(values[e]));
          }
          values.store(out_steps.to(out + to, 8 * j + c));
        }
      }
    }
    next_row(sums);
    next_row(sums);
  }
}

// 128 registers a thread: two blocks of 8 warps on an SM, or one of 16. The 72 logits of a thread in the
// largest windows do not fit in there beside the rest, and such windows fill the shared memory of an SM
// sooner anyway.
template <class T, int KEYS>
VK_KERNEL void VK_LAUNCH_BOUNDS((KEYS > 64 ? THREADS : MOST_THREADS), 1)
    forward_tensor_kernel(Problem problem, ForwardLayout layout) {
  const Params& params = problem.params;
  char* shared = shared_memory();
  T *y = reinterpret_cast<T*>(shared + layout.y), *q = reinterpret_cast<T*>(shared + layout.q);
  const Rows<T> z{reinterpret_cast<T*>(shared + layout.z), layout.ld_z, problem.value_dim, layout.blocks};
  auto* x_offsets = reinterpret_cast<int64_t*>(shared + layout.x_offsets);
  auto* out_offsets = reinterpret_cast<int64_t*>(shared + layout.out_offsets);
  auto* y_rows = reinterpret_cast<int*>(shared + layout.y_rows);
  auto* key_codes = reinterpret_cast<int*>(shared + layout.key_codes);
  auto* constants = reinterpret_cast<float*>(shared + layout.constants.first);

  const int tokens = problem.tokens, d = problem.value_dim, k = params.key_dim, used = layout.count * tokens;
  const int first_window = block_x() * layout.count;
  const BiasCodes codes(params.window_h, params.window_w);
  {
    const Share share(layout.row_bits);
    if (share.row < layout.rows) {
      const int window = problem.by_tokens.divide(share.row), token = share.row - window * tokens;
      const bool real = share.row < used;
      const int64_t offset = real ? problem.offset(params.x, first_window + window, token) : -1;
      load_row(z, params.x, share, offset, 4 * layout.blocks * params.num_heads, layout.by_chunk);
      if (share.chunk == 0) {
        x_offsets[share.row] = offset;
        out_offsets[share.row] = real ? problem.offset(params.out, first_window + window, token) : -1;
        y_rows[share.row] = real ? window * KEYS + token : -1;
      }
    }
  }
  VK_NO_UNROLL
  for (int slot = thread_x(); slot < KEYS; slot += block_dim_x())
    key_codes[slot] =
        slot < tokens ? slot + problem.by_window_w.divide(slot) * (params.window_w - 1) : INVALID;
  for (int window = 0; window < layout.count; ++window) {
    T* padding = y + (window * KEYS + tokens) * layout.ld_y;
    VK_NO_UNROLL
    for (int i = thread_x(); i < (KEYS - tokens) * layout.ld_y / 8; i += block_dim_x())
      zeros<T>().store(padding + 8 * i);
  }

  const int tiles = (tokens + 15) / 16;
  VK_NO_UNROLL
  for (int head = 0; head < params.num_heads; ++head) {
    if (head == 0 || layout.constants.sets == 1) {
      if (head > 0) sync_block();
      stage_constants<T>(constants, problem, layout.constants, head, layout.constants.sets);
    }
    sync_block();
    const float* set = constants + (layout.constants.sets == 1 ? 0 : head) * layout.constants.size;
    const View& weight = params.qkv_weight;
    const DenseWeights<T> weights{static_cast<const T*>(weight.data) + head * weight.stride[0],
                                  weight.stride[1], problem.qkv_rows, d};
    multiply_rows<T, 2, 2, 3>(
        z, head, 1, layout.by_blocks, layout.rows, 32, weights,
        [&](int row, int last_row, int column, float (&sums)[2][2][4]) {
          const float* bias = set + layout.constants.bias;
          const int g = lane_id() / 4, t = lane_id() % 4;
          VK_NO_UNROLL
          for (int here = row + g; here < last_row; here += 8, next_row(sums)) {
            const int target = y_rows[here];
            if (target < 0) continue;
            VK_UNROLL
            for (int j = 0; j < 2; ++j) {
              const int channel = column + 8 * j + 2 * t;  // qkv_rows are a multiple of 16
              const auto b = Vec<float, 2>::load(bias + channel);
              Vec<T, 2>{{from_float<T>(sums[0][j][0] + b[0]), from_float<T>(sums[0][j][1] + b[1])}}.store(
                  y + target * layout.ld_y + channel);
            }
          }
        });
    sync_block();
    convolve(y, layout.ld_y, q, layout.ld_q, set, problem, head, layout.count, KEYS);
    sync_block();

    const auto head_channels = Channels::of_heads<T>(params.heads);
    VK_NO_UNROLL
    for (int task = warp_id(); task < layout.count * tiles * layout.slices; task += block_dim_x() / 32) {
      const int all_tiles = layout.by_slice.divide(task), slice = task - all_tiles * layout.slices;
      const int window = layout.by_tile.divide(all_tiles), tile = all_tiles - window * tiles;
      const T* rows = y + window * KEYS * layout.ld_y;
      const int first = slice * layout.slice, last = first + layout.slice < d ? first + layout.slice : d;
      const bool keeps = present(params.heads) && first_window + window < problem.windows;
      attend<T, KEYS>(problem, q + window * KEYS * layout.ld_q, layout.ld_q, rows + k, rows + 2 * k,
                      layout.ld_y, key_codes, set + layout.constants.table, 16 * tile, first, last,
                      [&](int query, int channel, Vec<T, 4> output) {
                        constexpr int VALUES = 4;
                        T* here = z.quarter(window * tokens + query, head * layout.blocks + channel / 32,
                                            channel % 8 / 2) +
                                  channel % 32 / 8 * 2;
                        if (keeps) {
                          T* target = static_cast<T*>(params.heads.data) +
                                      Problem::heads_offset(params.heads, first_window + window, query) +
                                      (head * d + channel) * head_channels.stride;
                          VK_UNROLL
                          for (int i = 0; i < VALUES; i += 2) {
                            T* pair = target + 4 * i * head_channels.stride;
                            if (head_channels.vectorized) {
                              Vec<T, 2>{{output[i], output[i + 1]}}.store(pair);
                            } else {
                              pair[0] = output[i];
                              pair[head_channels.stride] = output[i + 1];
                            }
                          }
                        }
                        if (head + 1 < params.num_heads) {
                          auto next = Vec<T, VALUES>::load(here + 32 * layout.blocks);
                          VK_UNROLL
                          for (int i = 0; i < VALUES; ++i)
                            next[i] = from_float<T>(to_float(output[i]) + to_float(next[i]));
                          next.store(here + 32 * layout.blocks);
                        }
                        VK_UNROLL
                        for (int i = 0; i < VALUES; ++i) output[i] = from_float<T>(relu(to_float(output[i])));
                        output.store(here);
                      });
    }
  }

  sync_block();
  const DenseWeights<T> weights{static_cast<const T*>(params.proj_weight.data), params.proj_weight.stride[0],
                                params.channels, params.channels};
  multiply_rows<T, OUT_TILES_DOWN, OUT_TILES_ACROSS, 2>(
      z, 0, params.num_heads, layout.by_blocks, layout.rows, layout.out_rows, weights,
      [&](int row, int last_row, int column, float (&sums)[OUT_TILES_DOWN][OUT_TILES_ACROSS][4]) {
        const float* bias = constants + layout.constants.proj_bias;
        if (Channels::of<T>(params.x).vectorized && Channels::of<T>(params.out).vectorized) {
          write_out<T, 2>(params, sums, row, last_row, column, bias, x_offsets, out_offsets);
        } else {
          write_out<T, 1>(params, sums, row, last_row, column, bias, x_offsets, out_offsets);
        }
      });
}

// The windows of a block, 0 when not even one fits, and whether it has the constants of all heads at once.
int fitting_windows(const Problem& problem, int* sets) {
  constexpr int64_t COMFORTABLE = 72 * 1024;
  const int64_t spread = problem.windows / (2 * 132), channels = problem.params.channels;
  const int64_t weights = channels * (channels + problem.qkv_rows),
                activations = 2 * problem.tokens * channels;
  int best = 0;
  for (int count = 1; count == 1 || (count <= spread && count * problem.tokens <= 128); ++count) {
    const bool heavy = count == 1 || weights / (count - 1) > activations;
    const int64_t limit = heavy ? tile_attention::SHARED_LIMIT : COMFORTABLE;
    const int heads = problem.params.num_heads;
    const int most = ForwardLayout(problem, count, THREADS, heads).bytes <= limit ? heads : 1;
    if (ForwardLayout(problem, count, THREADS, most).bytes > limit) break;
    best = count;
    *sets = most;
  }
  return best;
}

template <class T, int KEYS>
void launch_forward(const Problem& problem, const ForwardLayout& layout, Stream stream) {
  launch(forward_tensor_kernel<T, KEYS>, Dim3{(problem.windows + layout.count - 1) / layout.count},
         layout.threads, static_cast<size_t>(layout.bytes), stream, problem, layout);
}

// Whether it could; *lacking is the workspace without which it has done nothing.
template <class T>
bool forward_tensor(Problem problem, Stream stream, int64_t* lacking) {
  const auto steps = [](const View& map) { return map.stride[1] < 0x40000000; };
  if (!suits_tensor_cores(problem.params) || !steps(problem.params.x) || !steps(problem.params.out))
    return false;
  int sets = 0;
  const int count = fitting_windows(problem, &sets), keys = key_rows(problem.tokens);
  if (count == 0) return false;
  *lacking = shape_weights<T>(&problem, stream);
  if (*lacking > 0) return true;
  // A block that has an SM to itself takes all the warps that its registers allow.
  const bool alone = (problem.windows + count - 1) / count <= multiprocessors();
  const ForwardLayout layout(problem, count, alone && keys <= 64 ? MOST_THREADS : THREADS, sets);
  switch (keys) {
    case 16:
      launch_forward<T, 16>(problem, layout, stream);
      break;
    case 64:
      launch_forward<T, 64>(problem, layout, stream);
      break;
    default:
      launch_forward<T, MAX_TOKENS>(problem, layout, stream);
  }
  return true;
}

}  // namespace

int64_t forward_cuda(const Params& params, Stream stream) {
  const Problem problem(params);
  return with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      int64_t lacking = 0;
      if (forward_tensor<T>(problem, stream, &lacking)) return lacking;
    }
    return forward_plain<T>(problem, stream);
  });
}

}  // namespace vitkernels::cascaded_group_attention
