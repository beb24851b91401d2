// The product of the tokens with the block-sparse weight or its transpose: forward, and the gradient of x.
//
// A block of threads computes TOKENS tokens x TILES tiles of outputs, which may belong to several block rows.
// It walks the union of the columns stored in these rows, in ascending order: tokens are loaded once a column
// and multiplied with those blocks that exist. Loads run STAGES - 1 stages ahead of the multiplication. A
// warp takes 32 tokens and all tiles, so that the warps of a block always have the same to do; blocks of
// threads are small beside the whole, which evens out rows of different population.
//
// Floor: 2 N nnz bh bw FLOPs at the matrix rate; x, y and the stored blocks cross memory once. From L2 comes
// x once for every TILES tiles of outputs whose columns meet, and the blocks once for every TOKENS tokens: at
// density 1/2 with 128 x 128 (16 bits), about 43 FLOPs a byte.
#include "product.h"
#include "tiles.h"
#include "vitkernels/tile_attention_engine.h"
#include "vitkernels/warp_product.h"

namespace vitkernels::block_sparse_linear {
namespace {

// 16 tokens of the warp's sums to rows of y, through shared memory, so that 16 bytes go out at a time.
template <int TILES, class T>
VK_DEVICE void store(const accumulate_t<T> (&sums)[TILES][2][4], T* scratch, const Problem<T>& p, T* y,
                     int64_t y_row, bool vectors, Activation activation, int64_t first_token,
                     int first_tile) {
  constexpr int WIDTH = Config<T>::WIDTH, LD = 16 * TILES + WIDTH, CHUNKS = 16 * TILES / WIDTH;
  const int g = lane_id() / 4, t = lane_id() % 4;
  VK_UNROLL
  for (int i = 0; i < TILES; ++i) {
    VK_UNROLL
    for (int j = 0; j < 2; ++j) {
      const auto& s = sums[i][j];
      T* to = scratch + g * LD + 16 * i + 8 * j + 2 * t;
      VK_UNROLL
      for (int half = 0; half < 2; ++half)
        Vec<T, 2>{{from_accumulate<T>(activate<T>(s[2 * half], activation)),
                   from_accumulate<T>(activate<T>(s[2 * half + 1], activation))}}
            .store(to + 8 * half * LD);
    }
  }
  sync_warp();
  VK_NO_UNROLL
  for (int at = lane_id(); at < 16 * CHUNKS; at += 32) {
    const int row = at / CHUNKS, column = at % CHUNKS * WIDTH;
    const int64_t token = first_token + row;
    const OutputTile tile(p, first_tile + column / 16);
    const int count = tile.count - column % 16;
    if (token >= p.tokens || count <= 0) continue;
    const T* from = scratch + row * LD + column;
    T* to = y + token * y_row + tile.first + column % 16;
    if (vectors) {
      Vec<T, WIDTH>::load(from).store(to);
      continue;
    }
    VK_UNROLL
    for (int e = 0; e < WIDTH; ++e)
      if (e < count) to[e] = from[e];
  }
  sync_warp();
}

// ROWS x SIDES warps, each 32 tokens x TILES tiles.
template <class T, bool BY_ROWS_, int TILES, int ROWS, int SIDES>
struct Shape {
  using C = Config<T>;
  static constexpr bool BY_ROWS = BY_ROWS_;
  static constexpr int WARPS = ROWS * SIDES, THREADS = 32 * WARPS, TOKENS = 32 * ROWS;
  static constexpr int ALL_TILES = TILES * SIDES, OUTPUTS = 16 * ALL_TILES;
  static constexpr int LD = BY_ROWS ? C::LD : OUTPUTS + C::WIDTH;  // of the weights
  static constexpr int X = TOKENS * C::LD, STAGE = X + (BY_ROWS ? OUTPUTS : C::DEPTH) * LD;
  static constexpr int SCRATCH = 16 * (16 * TILES + C::WIDTH);  // of a warp
  static constexpr int STAGED = C::STAGES * STAGE, SCRATCHES = WARPS * SCRATCH;
  static constexpr size_t SHARED = sizeof(T) * (STAGED > SCRATCHES ? STAGED : SCRATCHES);
};

template <class T, bool BY_ROWS, int TILES, int ROWS, int SIDES>
VK_KERNEL void VK_LAUNCH_BOUNDS(32 * ROWS * SIDES, 1) product_kernel(Problem<T> p) {
  using C = Config<T>;
  using S = Shape<T, BY_ROWS, TILES, ROWS, SIDES>;
  constexpr int STAGES = C::STAGES;
  T* stages = reinterpret_cast<T*>(shared_memory());
  const int64_t first_token = static_cast<int64_t>(block_x() / p.groups) * S::TOKENS;
  const int first_tile = block_x() % p.groups * S::ALL_TILES;
  const int warp_row = warp_id() % ROWS, side = SIDES == 1 ? 0 : warp_id() / ROWS;

  Walk<S::ALL_TILES> walk(p, first_tile);
  const OutputTile mine(p, first_tile + lane_id() % S::ALL_TILES);
  // Loads the next stage to a place in the ring and gives the masks of its steps, 0 when there is none left.
  const auto load = [&](int place) {
    Step steps[C::STEPS];
    uint32_t masks = 0;
    VK_UNROLL
    for (int s = 0; s < C::STEPS; ++s) {
      steps[s] = walk.next(p);
      masks |= static_cast<uint32_t>(steps[s].mask) << (S::ALL_TILES * s);
    }
    T* stage = stages + place * S::STAGE;
    load_tokens<S::TOKENS, S::THREADS>(stage, p, first_token, steps);
    load_weights<BY_ROWS, S::ALL_TILES, S::WARPS>(stage + S::X, p, mine, steps);
    cp_async_commit();
    return masks;
  };

  WarpSums<T, TILES> sums;
  clear_sums<T, TILES>(sums);
  uint32_t masks[STAGES];  // of the stages in flight, the oldest first
  VK_UNROLL
  for (int s = 0; s < STAGES - 1; ++s) masks[s] = load(s);
  int place = 0;
  VK_NO_UNROLL
  while (masks[0] != 0) {
    cp_async_wait<STAGES - 2>();
    sync_block();  // the stage is there for all, and all are done with the one before
    masks[STAGES - 1] = load(place == 0 ? STAGES - 1 : place - 1);
    const T* stage = stages + place * S::STAGE;
    VK_UNROLL
    for (int s = 0; s < C::STEPS; ++s) {
      const int mask = masks[0] >> (S::ALL_TILES * s + TILES * side) & ((1u << TILES) - 1);
      const T* weights =
          stage + S::X + 16 * s * (BY_ROWS ? 1 : S::LD) + 16 * TILES * side * (BY_ROWS ? S::LD : 1);
      if (mask != 0)
        multiply_step<true, BY_ROWS, C::LD, S::LD, T, TILES>(sums, stage + warp_row * 32 * C::LD + 16 * s,
                                                             weights, mask);
    }
    place = place == STAGES - 1 ? 0 : place + 1;
    VK_UNROLL
    for (int s = 0; s < STAGES - 1; ++s) masks[s] = masks[s + 1];
  }
  sync_block();  // the stages' memory becomes the warps' scratch

  const int own_tile = first_tile + TILES * side;
  if (p.bias != nullptr) {
    const int t = lane_id() % 4;
    VK_UNROLL
    for (int i = 0; i < TILES; ++i) {
      const OutputTile tile(p, own_tile + i);
      VK_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int column = c / 2 * 8 + 2 * t + c % 2;
        if (column >= tile.count) continue;
        const auto bias = to_accumulate(p.bias[tile.first + column]);
        VK_UNROLL
        for (int r = 0; r < 4; ++r) sums[r / 2][i][c / 2][r % 2 * 2 + c % 2] += bias;
      }
    }
  }
  T* scratch = stages + warp_id() * S::SCRATCH;
  VK_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t token = first_token + warp_row * 32 + 16 * half;
    if (p.before != nullptr)
      store<TILES>(sums[half], scratch, p, p.before, p.before_row, p.before_vectors, Activation::none, token,
                   own_tile);
    store<TILES>(sums[half], scratch, p, p.y, p.y_row, p.y_vectors, p.activation, token, own_tile);
  }
}

template <class T>
Problem<T> make_problem(const Params& params, const ProductCall& call) {
  const Index index(params.index, params.block_rows, params.block_cols, params.nnz);
  const bool by_rows = !call.transposed;
  const auto whole = [](int size) { return size % WIDTH<T> == 0; };
  Problem<T> p;
  p.x = static_cast<const T*>(call.x.data);
  p.values = static_cast<const T*>(params.values.data);
  p.bias = static_cast<const T*>(call.bias.data);
  p.y = static_cast<T*>(call.y.data);
  p.before = static_cast<T*>(call.before.data);
  p.x_row = call.x.stride[0];
  p.y_row = call.y.stride[0];
  p.before_row = call.before.stride[0];
  p.tokens = params.tokens;
  p.pointers = by_rows ? index.crow : index.crow_t;
  p.indices = by_rows ? index.col : index.row_t;
  p.ids = by_rows ? nullptr : index.perm_t;
  p.taken = by_rows ? params.in_features : params.out_features;
  p.given = by_rows ? params.out_features : params.in_features;
  p.depth = by_rows ? params.block_width : params.block_height;
  p.out = by_rows ? params.block_height : params.block_width;
  const int tiles_of_row = (p.out + 15) / 16;
  p.tiles_of_row = Divisor(tiles_of_row);
  p.tiles = (by_rows ? params.block_rows : params.block_cols) * tiles_of_row;
  p.activation = call.activation;
  p.x_vectors = aligned<T>(call.x) && whole(p.depth) && whole(p.taken);
  p.weight_vectors = reinterpret_cast<uintptr_t>(p.values) % 16 == 0 && whole(params.block_width) &&
                     (!by_rows || whole(p.taken));
  p.y_vectors = aligned<T>(call.y) && whole(p.out) && whole(p.given);
  p.before_vectors = aligned<T>(call.before) && whole(p.out) && whole(p.given);
  return p;
}

template <class S, class T>
Dim3 grid(const Problem<T>& p) {
  return {(p.tokens + S::TOKENS - 1) / S::TOKENS * ((p.tiles + S::ALL_TILES - 1) / S::ALL_TILES)};
}

template <int TILES, int ROWS, int SIDES, class T>
void launch_product(Problem<T> p, bool by_rows, Stream stream) {
  const auto start = [&](auto kernel, auto shape) {
    using S = decltype(shape);
    p.groups = (p.tiles + S::ALL_TILES - 1) / S::ALL_TILES;
    launch(kernel, grid<S>(p), S::THREADS, S::SHARED, stream, p);
  };
  if (by_rows) {
    start(product_kernel<T, true, TILES, ROWS, SIDES>, Shape<T, true, TILES, ROWS, SIDES>());
  } else {
    start(product_kernel<T, false, TILES, ROWS, SIDES>, Shape<T, false, TILES, ROWS, SIDES>());
  }
}

// Fewer large blocks of threads than this leave a large GPU idle, or its last wave: small ones then.
constexpr int64_t FEW_BLOCKS = 264;

}  // namespace

void product(const Params& params, const ProductCall& call, Stream stream) {
  if (params.tokens == 0) return;
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p = make_problem<T>(params, call);
    if constexpr (Config<T>::HALF) {
      if (warpgroup_product(params, p, !call.transposed, call.workspace, stream)) return;
      if (grid<Shape<T, true, 8, 4, 2>>(p).x >= FEW_BLOCKS) {
        launch_product<8, 4, 2>(p, !call.transposed, stream);
      } else {
        launch_product<4, 2, 1>(p, !call.transposed, stream);
      }
    } else {
      launch_product<4, 4, 1>(p, !call.transposed, stream);
    }
  });
}

int64_t forward_workspace_cuda(const Params& p) {
  return product_workspace(p, p.transposed);
}

void forward_cuda(const Params& p, Stream stream) {
  product(p, {p.transposed, p.activation, p.x, p.bias, p.before, p.y, p.workspace}, stream);
}

}  // namespace vitkernels::block_sparse_linear
