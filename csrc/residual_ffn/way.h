// Which kernels take a call, and how it is cut: by a model of what each way costs.
#pragma once
#include "hopper.h"
#include "split.h"

namespace vitkernels::residual_ffn {

constexpr int SMS = 132;  // of the large devices that the tiles are chosen for

enum class Kind { PLAIN, FUSED, TILES, SPLIT, HOPPER };

struct Way {
  Kind kind = Kind::PLAIN;
  Tiles first, second;             // the launches of tiles; `first` of fused
  int columns1 = 0, columns2 = 0;  // of split
  double time = 0;
};

// A model of an H200 that need only order the ways of computing. Nanoseconds, FLOPs and bytes of an SM.
constexpr double LAUNCH_NS = 2000;  // with the latencies of a block
constexpr double PRODUCT_FLOPS_NS = 4300, FETCH_BYTES_NS = 80;
constexpr double INPUT_NS = 0.15;  // an element of u
constexpr double OVERLAP = 0.75;   // of two blocks on an SM: one computes u or waits while one multiplies
constexpr double L2_BYTES_NS = 4000;

// `blocks` of which each makes some elements of u, multiplies with so many of its eight warps and fetches
// weights.
inline double launch_time(int64_t blocks, int64_t bytes, double inputs, double flops, double warps,
                          double fetched) {
  const int64_t fit = 228 * 1024 / (bytes + 1024) >= 2 ? 2 : 1;  // on an SM
  const int64_t together = blocks <= SMS ? 1 : fit, waves = (blocks + SMS * together - 1) / (SMS * together);
  const double share = warps * together < WARPS ? warps * together / WARPS : 1;
  const double multiplying = flops / (PRODUCT_FLOPS_NS * share), fetching = fetched / FETCH_BYTES_NS;
  const double block = inputs * INPUT_NS + (multiplying > fetching ? multiplying : fetching);
  return LAUNCH_NS + waves * (together == 1 ? block : together * OVERLAP * block);
}

inline int64_t tiles_of(const Problem& problem, int row_bits) {
  return (problem.tokens + (int64_t{1} << row_bits) - 1) >> row_bits;
}

inline void keep_fused(Tiles* best, const Problem& problem, int row_bits, int depth, int64_t limit) {
  const Params& p = problem.params;
  const int64_t bytes = FusedLayout(p, row_bits, depth).bytes;
  if (bytes > limit) return;
  const int rows = 1 << row_bits;
  const double weights = 2.0 * p.channels * p.hidden;
  const double time = launch_time(tiles_of(problem, row_bits), bytes, p.dw_weight ? rows * p.channels : 0,
                                  2 * weights * (rows < 32 ? 32 : rows), WARPS, 2 * weights);
  if (best->time == 0 || time < best->time) *best = {row_bits, 0, depth, time};
}

// The cheapest launch of tiles for a product of `outputs` columns and some depth.
inline Tiles choose_tiles(const Problem& problem, int outputs, int depth_of_product, bool expands,
                          int64_t limit) {
  const Params& p = problem.params;
  Tiles best;
  for (int row_bits = 5; row_bits <= 6; ++row_bits) {
    for (int columns = 64; columns / 2 < outputs && columns <= 256; columns *= 2) {
      for (int depth = 64; depth >= 32; depth /= 2) {
        Tiles tiles{row_bits, columns, depth, 0};
        const int64_t bytes = TilesLayout(tiles, depth_of_product, expands ? taps_elements(p) : 0).bytes;
        if (bytes > limit) continue;
        const int rows = 1 << row_bits, most = columns < outputs ? columns : outputs;
        const double warps = (most + 31) / 32 * rows / 32;
        const int64_t blocks = tiles_of(problem, row_bits) * ((outputs + columns - 1) / columns);
        tiles.time = launch_time(blocks, bytes, expands && p.dw_weight ? rows * p.channels : 0,
                                 2.0 * rows * most * depth_of_product, warps < WARPS ? warps : WARPS,
                                 2.0 * depth_of_product * (most + (expands ? 0 : rows)));
        if (best.time == 0 || tiles.time < best.time) best = tiles;
      }
    }
  }
  return best;
}

// The widest for which the launch fills the device.
inline int split_columns(const Problem& problem, int columns) {
  return tiles_of(problem, SPLIT_BITS) * ((columns + 63) / 64) >= 64 ? 64 : 32;
}

inline Way choose_way(const Problem& problem) {
  const Params& p = problem.params;
  Way best;
  if (sizeof_dtype(p.dtype) != 2 || p.channels % 16 != 0 || p.hidden % 16 != 0) return best;
  if (fits_hopper(problem)) {
    best.kind = Kind::HOPPER;
    return best;
  }
  const auto limit = static_cast<int64_t>(shared_limit());
  const auto consider = [&](const Way& way) {
    if (best.kind == Kind::PLAIN || way.time < best.time) best = way;
  };
  Tiles fused;
  for (int row_bits = 4; row_bits <= 6; ++row_bits)
    for (int depth = 64; depth >= 32; depth /= 2) keep_fused(&fused, problem, row_bits, depth, limit);
  if (fused.time > 0) consider({Kind::FUSED, fused, {}, 0, 0, fused.time});
  const Tiles expand = choose_tiles(problem, p.hidden, p.channels, true, limit),
              contract = choose_tiles(problem, p.channels, p.hidden, false, limit);
  if (expand.time > 0 && contract.time > 0)
    consider({Kind::TILES, expand, contract, 0, 0, expand.time + contract.time});
  const int columns1 = split_columns(problem, p.hidden), columns2 = split_columns(problem, p.channels);
  if (SplitLayout(columns1, p.channels, taps_elements(p)).bytes <= limit &&
      SplitLayout(columns2, p.hidden, 0).bytes <= limit) {
    const double weights = 4.0 * p.channels * p.hidden;
    const double time = 2 * LAUNCH_NS + tiles_of(problem, SPLIT_BITS) * weights / L2_BYTES_NS;
    consider({Kind::SPLIT, {}, {}, columns1, columns2, time});
  }
  return best;
}

}  // namespace vitkernels::residual_ffn
