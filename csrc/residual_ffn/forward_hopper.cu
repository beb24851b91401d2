// Forward on Hopper: u of all tokens, dense in a workspace, then two products that the copy engine feeds.
//
// Of N tokens the three launches move 10 N C + 4 N H bytes, of which x and the result alone, 4 N C, have to
// come from memory; the rest is still in L2. For EfficientViT-M5's first stage at batch 256, 50,176 tokens,
// 192 channels and 384 hidden units, that is 35 us of L2 at 5 TB/s, and 15 more where two or three strips of
// columns read u and the hidden layer again, beside 18 us of products at 800 TFLOP/s. A block that kept the
// hidden layer of its tokens to itself would save half of the former, but would bring all weights, 295 KB,
// through L2 for 64 or 128 tokens.
#include "hopper.h"

namespace vitkernels::residual_ffn {
namespace {

// Where position `at` of a block's shared memory lies in the map: its lines and columns have a margin of one.
struct Staged {
  int64_t offset = 0;
  bool real = false;

  VK_DEVICE Staged(const Problem& problem, const InputLayout& layout, int64_t first_image, int first_line,
                   int at) {
    const Params& p = problem.params;
    const int width = p.width + 2, line_of_block = at / width, image = line_of_block / (layout.lines + 2);
    const int y = first_line + line_of_block - image * (layout.lines + 2) - 1, x = at % width - 1;
    real = first_image + image < p.batch && y >= 0 && y < p.height && x >= 0 && x < p.width;
    offset = (first_image + image) * p.x.stride[0] + y * p.x.stride[2] + x * p.x.stride[3];
  }
};

// x of 64 channels from `first` on, zeros outside of the map and beyond the last channel. Neighbouring
// threads have neighbouring channels where those are dense in memory, else neighbouring positions.
template <class T>
VK_DEVICE void stage_maps(T* tile, const Problem& problem, const InputLayout& layout, int64_t first_image,
                          int first_line, int first) {
  const Params& p = problem.params;
  const Chunks<T> x(p.x);
  constexpr int AT_ONCE = 32;  // loads of a thread that are on their way together
  const int positions = layout.images * (layout.lines + 2) * (p.width + 2);
  if (x.vectorized) {
    const int channel = 2 * lane_id();
    VK_UNROLL_4
    for (int at = warp_id(); at < positions; at += WARPS) {
      const Staged staged(problem, layout, first_image, first_line, at);
      Vec<T, 2> pair{{from_float<T>(0.0f), from_float<T>(0.0f)}};
      if (staged.real && first + channel < p.channels)
        pair = Vec<T, 2>::load(x.data + staged.offset + first + channel);
      pair.store(tile + at * 2 * INPUT_LD + channel);
    }
    return;
  }
  VK_NO_UNROLL
  for (int at = thread_x(); at < positions; at += THREADS) {
    const Staged staged(problem, layout, first_image, first_line, at);
    const T* from = x.data + staged.offset + first * x.stride;
    T* const to = tile + at * 2 * INPUT_LD;
    VK_NO_UNROLL
    for (int channel = 0; channel < INPUT_CHANNELS; channel += AT_ONCE) {
      const int channels = staged.real ? p.channels - first - channel : 0;
      Vec<T, 2> pairs[AT_ONCE / 2];
      VK_UNROLL
      for (int e = 0; e < AT_ONCE; ++e, from += x.stride)
        pairs[e / 2][e % 2] = e / 16 * 16 < channels ? *from : from_float<T>(0.0f);
      VK_UNROLL
      for (int e = 0; e < AT_ONCE / 2; ++e) pairs[e].store(to + channel + 2 * e);
    }
  }
}

// u of all tokens to the workspace. A lane has two channels, whose taps stay in its registers, and goes along
// a line, of which it reads every position three times: for the line itself and those above and below.
template <class T>
VK_KERNEL void VK_LAUNCH_BOUNDS(THREADS, 3) hopper_inputs_kernel(Problem problem, InputLayout layout) {
  const Params& p = problem.params;
  T* const tile = reinterpret_cast<T*>(shared_memory());
  const int64_t group = block_x() / layout.bands, first_image = group * layout.images;
  const int first_line = static_cast<int>(block_x() - group * layout.bands) * layout.lines;
  const int first = block_y() * INPUT_CHANNELS, channel = first + 2 * lane_id();
  const bool mine = channel < p.channels, convolves = p.dw_weight.data != nullptr;

  admit_launch();
  const int channels = p.channels - first < INPUT_CHANNELS ? p.channels - first : INPUT_CHANNELS;
  float* const staged_taps = reinterpret_cast<float*>(shared_memory() + layout.taps);
  if (convolves) stage_taps<T>(staged_taps, problem, first, channels);
  cp_async_commit();
  stage_maps(tile, problem, layout, first_image, first_line, first);
  cp_async_wait<0>();
  sync_block();
  if (!mine) return;
  float taps[9][2] = {}, biases[2] = {};
  if (convolves) {
    VK_UNROLL
    for (int c = 0; c < 2; ++c) {
      const int of_block = 2 * lane_id() + c;
      VK_UNROLL
      for (int tap = 0; tap < 9; ++tap) taps[tap][c] = staged_taps[9 * of_block + tap];
      biases[c] = staged_taps[9 * channels + of_block];
    }
  }

  const int pitch = (p.width + 2) * 2 * INPUT_LD;
  VK_NO_UNROLL
  for (int line = warp_id(); line < layout.images * layout.lines; line += WARPS) {
    const int image = line / layout.lines, y = first_line + line - image * layout.lines;
    if (first_image + image >= p.batch || y >= p.height) continue;
    const T* from = tile + (image * (layout.lines + 2) + line - image * layout.lines) * pitch + 2 * lane_id();
    T* to =
        workspace_u<T>(problem) + (((first_image + image) * p.height + y) * p.width) * p.channels + channel;
    float columns[3][3][2];  // the three columns around a position take turns; of each three lines
    const auto read_column = [&](float (&column)[3][2]) {
      VK_UNROLL
      for (int i = 0; i < 3; ++i) {
        const auto pair = Vec<T, 2>::load(from + i * pitch);
        column[i][0] = to_float(pair[0]);
        column[i][1] = to_float(pair[1]);
      }
      from += 2 * INPUT_LD;
    };
    read_column(columns[0]);
    read_column(columns[1]);
    VK_NO_UNROLL
    for (int x = 0; x < p.width; x += 3) {
      VK_UNROLL
      for (int turn = 0; turn < 3; ++turn) {
        if (x + turn >= p.width) break;
        read_column(columns[(turn + 2) % 3]);
        Vec<T, 2> u;
        VK_UNROLL
        for (int c = 0; c < 2; ++c) {
          const float center = columns[(turn + 1) % 3][1][c];
          float sum = biases[c];
          VK_UNROLL
          for (int tap = 0; tap < 9; ++tap) sum += taps[tap][c] * columns[(turn + tap % 3) % 3][tap / 3][c];
          u[c] = from_float<T>(convolves ? center + sum : center);
        }
        u.store(to);
        to += p.channels;
      }
    }
  }
}

// EXPAND: hidden = relu(scale1 * (weight1 u) + bias1), `left` being u; else
// out = u + scale2 * (weight2 hidden) + bias2, `left` being the hidden layer.
//
// A stage's product may run until the barrier after the next one, so that of `places` stages all but two are
// on their way. u of the result's columns is one stage more, and becomes the result in its place.
template <class T, class Shape, bool EXPAND>
VK_KERNEL void VK_LAUNCH_BOUNDS(Shape::THREADS, Shape::BLOCKS)
    hopper_product_kernel(Problem problem, const VK_GRID_CONSTANT MatrixMap left_map,
                          const VK_GRID_CONSTANT MatrixMap weight_map, const VK_GRID_CONSTANT MatrixMap u_map,
                          int places) {
#if defined(VK_WGMMA)
  constexpr int ROWS = Shape::ROWS, COLUMNS = Shape::COLUMNS, PARTS = COLUMNS / STAGE_FEATURES;
  constexpr int PART_BYTES = ROWS * STAGE_ROW;  // of the result: 64 columns
  const Params& p = problem.params;
  const int outputs = EXPAND ? p.hidden : p.channels, depth = EXPAND ? p.channels : p.hidden;
  const int strips = (outputs + COLUMNS - 1) / COLUMNS, tile = block_x() / strips;
  const int first_column = (block_x() - tile * strips) * COLUMNS;
  const int columns = outputs - first_column < COLUMNS ? outputs - first_column : COLUMNS;
  const int64_t first = static_cast<int64_t>(tile) * ROWS;
  const int stages = (depth + STAGE_FEATURES - 1) / STAGE_FEATURES, copied = EXPAND ? stages : stages + 1;
  char* const ring = shared_memory();
  auto* const scale = reinterpret_cast<float*>(ring + places * Shape::STAGE_BYTES);
  float* const bias = scale + COLUMNS;
  Arrival* const arrivals = reinterpret_cast<Arrival*>(bias + COLUMNS);

  // By one thread, what does not depend on the launch before and what does.
  const auto fetch_weight = [&](int stage, int place) {
    const int parts = (columns + STAGE_FEATURES - 1) / STAGE_FEATURES;
    expect_arrival(arrivals + place, stage < stages ? Shape::STAGE_BYTES : parts * PART_BYTES);
    if (stage < stages)
      copy_tile(ring + place * Shape::STAGE_BYTES + Shape::LEFT_BYTES, weight_map, stage * STAGE_FEATURES,
                first_column, arrivals + place);
  };
  const auto fetch_left = [&](int stage, int place) {
    char* const to = ring + place * Shape::STAGE_BYTES;
    if (stage < stages) {
      copy_tile(to, left_map, stage * STAGE_FEATURES, static_cast<int>(first), arrivals + place);
    } else {
      VK_UNROLL
      for (int part = 0; part < PARTS; ++part) {
        if (part * STAGE_FEATURES < columns)
          copy_tile(to + part * PART_BYTES, u_map, first_column + part * STAGE_FEATURES,
                    static_cast<int>(first), arrivals + place);
      }
    }
  };

  const int ahead = places - 2;
  if constexpr (EXPAND) admit_launch();  // what comes after the other one is not ours
  if (thread_x() == 0) {
    prepare_arrivals(arrivals, places);
    for (int stage = 0; stage < ahead && stage < copied; ++stage) fetch_weight(stage, stage);
  }
  stage_vector<T>(scale, problem, EXPAND ? p.scale1 : p.scale2, first_column, columns);
  stage_vector<T>(bias, problem, EXPAND ? p.bias1 : p.bias2, first_column, columns);
  cp_async_commit();
  wait_for_launch();
  if (thread_x() == 0)
    for (int stage = 0; stage < ahead && stage < copied; ++stage) fetch_left(stage, stage);
  cp_async_wait<0>();
  sync_block();

  float sums[COLUMNS / 2];
  VK_UNROLL
  for (float& sum : sums) sum = 0.0f;
  hold(sums);
  int place = 0, use = 0, next = ahead;  // next: the place of the stage that is `ahead`
  VK_NO_UNROLL
  for (int stage = 0; stage < stages; ++stage) {
    wait_arrival(arrivals + place, use);
    // Of every warpgroup, the products up to the stage before the last are done here, and that one's place
    // free.
    sync_block();
    using Rows = Operand<STAGE_ROW, Major::FEATURES_SIDE_BY_SIDE>;
    const Rows left(ring + place * Shape::STAGE_BYTES + warp_id() / 4 * 64 * STAGE_ROW);
    const Rows right(ring + place * Shape::STAGE_BYTES + Shape::LEFT_BYTES);
    wgmma_fence();
    VK_UNROLL
    for (int k = 0; k < STAGE_ROW; k += 32) wgmma<T, COLUMNS>(sums, left.advance(k), right.advance(k));
    wgmma_commit();
    if (stage + ahead < copied && thread_x() == 0) {
      fetch_weight(stage + ahead, next);
      fetch_left(stage + ahead, next);
    }
    next = next + 1 == places ? 0 : next + 1;
    if (++place == places) {
      place = 0;
      ++use;
    }
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  hold(sums);
  // u is at the place after the last stage's; the hidden layer takes the first one, when all have multiplied.
  if constexpr (!EXPAND) wait_arrival(arrivals + place, use);
  sync_block();
  char* const result = EXPAND ? ring : ring + place * Shape::STAGE_BYTES;
  const auto chunk_at = [&](int row, int chunk) {
    return reinterpret_cast<T*>(result + chunk / 8 * PART_BYTES + row * STAGE_ROW +
                                chunk_of<STAGE_ROW>(row, chunk % 8) * 16);
  };
  const int top = warp_id() * 16, g = lane_id() / 4, t = lane_id() % 4;
  VK_UNROLL
  for (int j = 0; j < COLUMNS / 8; ++j) {
    const auto factor = Vec<float, 2>::load(scale + 8 * j + 2 * t),
               shift = Vec<float, 2>::load(bias + 8 * j + 2 * t);
    VK_UNROLL
    for (int low = 0; low < 2; ++low) {
      T* const at = chunk_at(top + g + 8 * low, j) + 2 * t;
      const float left = sums[4 * j + 2 * low] * factor[0] + shift[0],
                  right = sums[4 * j + 2 * low + 1] * factor[1] + shift[1];
      if constexpr (EXPAND) {
        Vec<T, 2>{{from_float<T>(relu(left)), from_float<T>(relu(right))}}.store(at);
      } else {
        const auto before = Vec<T, 2>::load(at);
        Vec<T, 2>{{from_float<T>(to_float(before[0]) + left), from_float<T>(to_float(before[1]) + right)}}
            .store(at);
      }
    }
  }

  // A warp's own 16 rows, whole, where the channels are dense in memory; else neighbouring threads have
  // neighbouring tokens.
  const Chunks<T> out(p.out);
  if (EXPAND || out.vectorized) {
    sync_warp();
    VK_NO_UNROLL
    for (int i = lane_id(); i < 16 * COLUMNS / 8; i += 32) {
      const int row = top + i / (COLUMNS / 8), chunk = i % (COLUMNS / 8);
      if (8 * chunk >= columns || first + row >= problem.tokens) continue;
      const auto values = Vec<T, 8>::load(chunk_at(row, chunk));
      T* to = static_cast<T*>(p.workspace) + (first + row) * p.hidden;
      if constexpr (!EXPAND) to = out.data + Place(problem, first, row).offset(p.out);
      values.store(to + first_column + 8 * chunk);
    }
    return;
  }
  sync_block();
  const int row = thread_x() % ROWS;
  const Place to(problem, first, row);
  if (!to.real) return;
  const int64_t target = to.offset(p.out) + first_column * out.stride;
  VK_NO_UNROLL
  for (int chunk = thread_x() / ROWS; 8 * chunk < columns; chunk += Shape::THREADS / ROWS)
    out.store(target + 8 * chunk * out.stride, Vec<T, 8>::load(chunk_at(row, chunk)));
#endif
}

// Which shape a product takes, and the places of its stages in shared memory.
struct ProductChoice {
  int shape = 0, places = 0;
  double time = 0;
};

// A model of an H200, in nanoseconds, that need only order the shapes.
template <class Shape>
void keep_product(ProductChoice* best, int number, int64_t tokens, int outputs, int depth, int copied,
                  int processors) {
  constexpr double LAUNCH_NS = 2000, BLOCK_NS = 1500, COPY_NS = 700, FLOPS_NS = 6500, BYTES_NS = 90;
  const int64_t blocks =
      (tokens + Shape::ROWS - 1) / Shape::ROWS * ((outputs + Shape::COLUMNS - 1) / Shape::COLUMNS);
  const int stages = (depth + STAGE_FEATURES - 1) / STAGE_FEATURES;
  for (int places = 3; places <= 6 && (places == 3 || places <= copied + 2); ++places) {
    const int64_t bytes = Shape::bytes(places), fit = 227 * 1024 / (bytes + 1024);
    const int64_t most = fit < Shape::BLOCKS ? fit : Shape::BLOCKS,
                  waves = (blocks + processors * most - 1) / (processors * most);
    const int64_t together = (blocks + processors * waves - 1) / (processors * waves);  // on an SM
    const double flops = 2.0 * Shape::ROWS * Shape::COLUMNS * STAGE_FEATURES;
    const double product = flops / FLOPS_NS, copy = Shape::STAGE_BYTES / BYTES_NS;
    const double busy = together * (product > copy ? product : copy), wait = COPY_NS / (places - 2);
    const double time = LAUNCH_NS + waves * (BLOCK_NS + stages * (busy > wait ? busy : wait));
    if (best->time == 0 || time < best->time) *best = {number, places, time};
  }
}

ProductChoice choose_product(int64_t tokens, int outputs, int depth, bool expands) {
  const int processors = multiprocessors();
  ProductChoice best;
  const int copied = (depth + STAGE_FEATURES - 1) / STAGE_FEATURES + (expands ? 0 : 1);
  keep_product<LargeProduct>(&best, 0, tokens, outputs, depth, copied, processors);
  keep_product<NarrowProduct>(&best, 1, tokens, outputs, depth, copied, processors);
  keep_product<SmallProduct>(&best, 2, tokens, outputs, depth, copied, processors);
  return best;
}

template <class T, bool EXPAND>
void launch_product(const Problem& problem, Stream stream) {
  const Params& p = problem.params;
  const int outputs = EXPAND ? p.hidden : p.channels, depth = EXPAND ? p.channels : p.hidden;
  const View& weight = EXPAND ? p.weight1 : p.weight2;
  const ProductChoice choice = choose_product(problem.tokens, outputs, depth, EXPAND);
  const T *hidden = static_cast<const T*>(p.workspace), *u = hidden + problem.tokens * p.hidden;
  const auto with_shape = [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t tiles = (problem.tokens + Shape::ROWS - 1) / Shape::ROWS;
    const MatrixMap of_u = map_matrix(u, problem.tokens, p.channels, p.channels, Shape::ROWS);
    launch_dependent(hopper_product_kernel<T, Shape, EXPAND>,
                     Dim3{tiles * ((outputs + Shape::COLUMNS - 1) / Shape::COLUMNS)}, Shape::THREADS,
                     static_cast<size_t>(Shape::bytes(choice.places)), stream, problem,
                     EXPAND ? of_u : map_matrix(hidden, problem.tokens, p.hidden, p.hidden, Shape::ROWS),
                     map_matrix(weight.data, outputs, depth, weight.stride[0], Shape::COLUMNS), of_u,
                     choice.places);
  };
  if (choice.shape == 0) return with_shape(LargeProduct{});
  if (choice.shape == 1) return with_shape(NarrowProduct{});
  with_shape(SmallProduct{});
}

}  // namespace

bool fits_hopper(const Problem& problem) {
  const Params& p = problem.params;
  const auto takes = [](const View& weight, int columns) {
    return weight.stride[1] == 1 && takes_matrix(weight.data, columns, weight.stride[0]);
  };
  return p.channels >= STAGE_FEATURES && problem.tokens * p.channels >= HOPPER_ELEMENTS &&
         takes(p.weight1, p.channels) && takes(p.weight2, p.hidden) &&
         InputLayout(p).bytes <= static_cast<int64_t>(MAX_SHARED_BYTES) && wgmma_available();
}

template <class T>
void forward_hopper(const Problem& problem, Stream stream) {
  const Params& p = problem.params;
  const InputLayout layout(p);
  const int64_t groups = (p.batch + layout.images - 1) / layout.images;
  launch(hopper_inputs_kernel<T>,
         Dim3{groups * layout.bands, (p.channels + INPUT_CHANNELS - 1) / INPUT_CHANNELS}, THREADS,
         static_cast<size_t>(layout.bytes), stream, problem, layout);
  // Each waits for all that the one before it writes, which itself has waited for the one before that.
  launch_product<T, true>(problem, stream);
  launch_product<T, false>(problem, stream);
}

template void forward_hopper<half_t>(const Problem&, Stream);
template void forward_hopper<bfloat16_t>(const Problem&, Stream);

}  // namespace vitkernels::residual_ffn
