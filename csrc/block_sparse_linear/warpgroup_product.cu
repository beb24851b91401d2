// Which shape of the warpgroups' product a call takes, and its launches.
#include "parts.h"
#include "product.h"
#include "warpgroup_product.h"

namespace vitkernels::block_sparse_linear {
namespace {

bool fits(int side) {
  return side == 32 || side == 64 || side == 128;
}

// Of an H100 or H200. Fewer large tiles than FEW_TILES leave too many of them idle.
constexpr int64_t PROCESSORS = 132, FEW_TILES = 100;
constexpr int64_t MOST_BLOCKS = 65535;  // of a grid's second dimension

// What a shape of tiles makes of a problem.
struct Work {
  int outputs;            // of a tile
  int64_t tiles, blocks;  // tiles in all; blocks of threads that share a group's
  int64_t time;           // what the slowest processor reads, L2 being the bound

  // `density` of 256 blocks are stored.
  Work(int64_t tokens, int64_t all_outputs, int64_t density, int64_t tile_tokens, int tile_outputs,
       int64_t resident)
      : outputs(tile_outputs) {
    const int64_t groups = ceil_div(all_outputs, tile_outputs), of_group = ceil_div(tokens, tile_tokens);
    tiles = groups * of_group;
    // Blocks that stay and overlap a tile with the next, where that does not leave many processors idle; else
    // one for each tile.
    const int64_t fit = PROCESSORS * resident / groups, waves = ceil_div(tiles, PROCESSORS * resident);
    const bool stay = fit > 0 && ceil_div(of_group, fit) * 16 <= waves * 17 + 8;
    blocks = stay && fit < of_group ? fit : of_group;
    if (blocks > MOST_BLOCKS) blocks = MOST_BLOCKS;
    time = (stay ? ceil_div(of_group, fit) : waves) * (256 * tile_tokens + density * tile_outputs);
  }
};

// What depends on sizes alone: which of three tiles, by how many blocks of threads a group's tiles are
// computed, and the lists of steps.
struct TilePlan {
  // Tokens x outputs of a tile: 192 x 256 asks least of L2, 192 x 192 may fill the last wave better, 64 x 128
  // is for problems of a few tiles.
  enum class Tile { wide, narrow, small };

  bool possible = false;
  Tile tile = Tile::small;
  int64_t blocks = 1;  // of threads, for a group
  StepLists lists{};

  TilePlan(const Params& p, bool by_rows) {
    if (p.dtype != DType::f16 && p.dtype != DType::bf16) return;
    if (!fits(p.block_height) || !fits(p.block_width)) return;
    const int depth = by_rows ? p.block_width : p.block_height,
              out = by_rows ? p.block_height : p.block_width;
    lists.rows = by_rows ? p.block_rows : p.block_cols;
    lists.columns = by_rows ? p.block_cols : p.block_rows;
    lists.steps_of_block = depth / STEP_DEPTH;
    if (int64_t{1} * lists.columns * lists.steps_of_block > MOST_STEPS) return;
    // Tokens and offsets are 32-bit in the kernel; a group's tiles lie some way behind the last token.
    if (p.nnz * p.block_height * p.block_width / 8 > INT_MAX || p.tokens > INT_MAX / 4) return;
    possible = true;

    const int64_t outputs = int64_t{1} * lists.rows * out;
    const int64_t density = 256 * p.nnz / (int64_t{1} * p.block_rows * p.block_cols);
    const Work wide(p.tokens, outputs, density, 192, 256, 1), narrow(p.tokens, outputs, density, 192, 192, 1);
    Work chosen(p.tokens, outputs, density, 64, 128, 3);
    if (narrow.tiles >= FEW_TILES) {
      tile = wide.time <= narrow.time ? Tile::wide : Tile::narrow;
      chosen = tile == Tile::wide ? wide : narrow;
    }
    blocks = chosen.blocks;
    const int width = out == 32 ? 32 : 64;
    lists.slots = chosen.outputs / width;
    lists.slots_of_row = out / width;
    lists.units_of_slot = width / 32;
    lists.warpgroups = tile == Tile::small ? 1 : 3;
    lists.steps_of_stage = stage_steps(lists.warpgroups);
    lists.block = depth * out / 8;
    lists.slot_stride = (by_rows ? width * depth : width) / 8;
    lists.unit_stride = (by_rows ? 32 * depth : 16 * out) / 8;
    lists.step_stride = (by_rows ? STEP_DEPTH : STEP_DEPTH * out) / 8;
  }

  int64_t bytes() const { return possible ? ceil_div(lists.bytes(), 256) * 256 : 0; }
};

template <class T, bool BY_ROWS, int N, int SLOTS, int WARPGROUPS>
void start(Problem<T> p, const StepLists& lists, int64_t blocks, Stream stream) {
  using S = WarpgroupShape<BY_ROWS, N, SLOTS, WARPGROUPS>;
  p.tiles = static_cast<int>(blocks);
  launch(warpgroup_product_kernel<T, BY_ROWS, N, SLOTS, WARPGROUPS>, {lists.groups(), blocks}, S::THREADS,
         S::FIXED + sizeof(int) * lists.ints(), stream, p, lists.entries, lists.ints());
}

template <class T, bool BY_ROWS, int N>
void start(const Problem<T>& p, const TilePlan& plan, Stream stream) {
  switch (plan.tile) {
    case TilePlan::Tile::wide:
      return start<T, BY_ROWS, N, 256 / N, 3>(p, plan.lists, plan.blocks, stream);
    case TilePlan::Tile::narrow:
      return start<T, BY_ROWS, N, 192 / N, 3>(p, plan.lists, plan.blocks, stream);
    case TilePlan::Tile::small:
      return start<T, BY_ROWS, N, 128 / N, 1>(p, plan.lists, plan.blocks, stream);
  }
}

}  // namespace

int64_t product_workspace(const Params& params, bool transposed) {
  return TilePlan(params, !transposed).bytes();
}

template <class T>
bool warpgroup_product(const Params& params, Problem<T> p, bool by_rows, void* workspace, Stream stream) {
  TilePlan plan(params, by_rows);
  if (!plan.possible || p.x_row > INT_MAX || p.tokens * p.x_row / 8 > INT_MAX || !p.x_vectors ||
      !p.weight_vectors || !wgmma_available())
    return false;
  StepLists& lists = plan.lists;
  lists.entries = static_cast<int*>(workspace);
  lists.pointers = p.pointers;
  lists.indices = p.indices;
  lists.ids = p.ids;
  list_steps(lists, stream);
  if (by_rows) {
    p.out == 32 ? start<T, true, 32>(p, plan, stream) : start<T, true, 64>(p, plan, stream);
  } else {
    p.out == 32 ? start<T, false, 32>(p, plan, stream) : start<T, false, 64>(p, plan, stream);
  }
  return true;
}

template bool warpgroup_product(const Params&, Problem<half_t>, bool, void*, Stream);
template bool warpgroup_product(const Params&, Problem<bfloat16_t>, bool, void*, Stream);

}  // namespace vitkernels::block_sparse_linear
