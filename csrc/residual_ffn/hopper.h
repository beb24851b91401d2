// The forward on Hopper, for many tokens: u of all, then either product by warpgroups, in three launches.
#pragma once
#include "tiles.h"
#include "vitkernels/matrix_copy.h"

namespace vitkernels::residual_ffn {

// Elements of x. Fewer leave most of the device idle, and take other kernels.
constexpr int64_t HOPPER_ELEMENTS = 1 << 16;

// A stage of a product: 64 features, 128 bytes of a row of either operand.
constexpr int STAGE_FEATURES = 64, STAGE_ROW = 128;

// u of some lines of one map, or of some whole maps, and 64 channels a block. A position in shared memory is
// an odd number of words, so that neighbours of a line lie in different banks.
constexpr int INPUT_CHANNELS = 64, INPUT_LD = INPUT_CHANNELS / 2 + 1;
struct InputLayout {
  int images = 1, lines = 1;  // of a block
  int bands = 1;              // of a map
  int taps = 0;               // byte offset: the channels' taps, [64][9] floats, and behind them their biases
  int64_t bytes = 0;

  explicit InputLayout(const Params& p) {
    constexpr int LINES = 16;            // two for every warp
    constexpr int64_t MOST = 44 * 1024;  // five blocks of an SM, where registers allow four
    const auto carve = [&] {
      Carver carver;
      carver.take<uint32_t>(int64_t{images} * (lines + 2) * (p.width + 2) * INPUT_LD);
      taps = carver.take<float>(p.dw_weight.data == nullptr ? 0 : 10 * INPUT_CHANNELS);
      bytes = carver.used();
      return bytes <= MOST;
    };
    lines = p.height < LINES ? p.height : LINES;
    images = LINES / lines;
    if (images > p.batch) images = static_cast<int>(p.batch);
    while (!carve() && images > 1) images /= 2;
    while (!carve() && lines > 1) lines /= 2;
    bands = (p.height + lines - 1) / lines;
  }
};

// 64 GROUPS tokens and COLUMNS rows of the weight a block, of which registers allow BLOCKS on an SM.
template <int GROUPS_, int COLUMNS_, int BLOCKS_>
struct ProductShape {
  static constexpr int GROUPS = GROUPS_, COLUMNS = COLUMNS_, BLOCKS = BLOCKS_;
  static constexpr int ROWS = 64 * GROUPS, THREADS = 128 * GROUPS;
  static constexpr int LEFT_BYTES = ROWS * STAGE_ROW, STAGE_BYTES = LEFT_BYTES + COLUMNS * STAGE_ROW;
  static constexpr int RESULT_BYTES = ROWS * COLUMNS * 2;
  static_assert(RESULT_BYTES <= STAGE_BYTES, "u, and then the result, take the place of a stage");

  static constexpr int64_t bytes(int places) {
    return int64_t{places} * (STAGE_BYTES + static_cast<int>(sizeof(Arrival))) + 2 * COLUMNS * sizeof(float);
  }
};
using LargeProduct = ProductShape<2, 128, 2>;
using NarrowProduct = ProductShape<2, 64, 3>;
using SmallProduct = ProductShape<1, 64, 5>;

// For 16-bit types, and channels and hidden units that are multiples of 16.
bool fits_hopper(const Problem& problem);

template <class T>
void forward_hopper(const Problem& problem, Stream stream);

}  // namespace vitkernels::residual_ffn
