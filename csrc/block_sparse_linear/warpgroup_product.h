// The product of the tokens with the block-sparse weight on Hopper's tensor cores: what forward.cu's kernel
// does, for half precision and blocks with sides of 32, 64 or 128.
//
// A block of threads computes tiles of TOKENS tokens x OUTPUTS outputs, one after another for one group of
// outputs. A warpgroup has 64 of the tokens and all of the outputs: all multiply with the same stored blocks,
// so that rows of different population unbalance nothing. A tile goes through the group's list
// (step_lists.h), a stage of one or two steps of 32 features at a time: x comes to registers once a step
// (ldmatrix), and each block that exists is two products of N columns. Copies run STAGES - 1 stages ahead,
// over the end of a tile into the next one, whose first stages arrive while this one is stored. All warps
// copy, so that none is late for its warpgroup's products.
//
// Floor: 2 N nnz bh bw FLOPs at the matrix rate. L2 hands out (TOKENS + density * OUTPUTS) * 64 bytes a step,
// that is TOKENS * OUTPUTS * density / (TOKENS + density * OUTPUTS) FLOPs a byte: 85 at density 0.6 with 192
// x 256, which at 6 TB/s bounds an H200 to 510 TFLOP/s; 128 x 256 would be bound to 420, 256 x 128 to 350.
// Shared memory then works 500 of 840 cycles a step (15 KB of blocks read by each of three warpgroups, 22 KB
// written), the tensor cores 460.
#pragma once
#include "step_lists.h"
#include "tiles.h"
#include "vitkernels/wgmma.h"

namespace vitkernels::block_sparse_linear {

// Where three warpgroups share a block's shared memory, a barrier serves two steps.
VK_HOST_DEVICE constexpr int stage_steps(int warpgroups) {
  return warpgroups == 1 ? 1 : 2;
}

template <bool BY_ROWS_, int N_, int SLOTS_, int WARPGROUPS_>
struct WarpgroupShape {
  static constexpr bool BY_ROWS = BY_ROWS_;
  static constexpr int N = N_, SLOTS = SLOTS_, WARPGROUPS = WARPGROUPS_, THREADS = 128 * WARPGROUPS;
  static constexpr int TOKENS = 64 * WARPGROUPS, OUTPUTS = N * SLOTS;
  static constexpr int STEPS = stage_steps(WARPGROUPS), STAGES = WARPGROUPS == 1 ? 5 : 6 / STEPS;
  // Weights are copied by units of 2 KB, a row of 16 bytes for each thread of a warpgroup: 32 outputs, or of
  // 64 outputs 16 features.
  static constexpr int UNITS = OUTPUTS / 32, UNIT = 32 * STEP_DEPTH;
  // In ints, of the list.
  static constexpr int RECORD = record_ints(UNITS, WARPGROUPS), ENTRY = WARPGROUPS * RECORD;
  // In elements. A slot's weights are [N][32], or [32][N] where rows are summed over.
  static constexpr int X = TOKENS * STEP_DEPTH, SLOT = N * STEP_DEPTH, STEP = X + OUTPUTS * STEP_DEPTH,
                       STAGE = STEPS * STEP;
  static constexpr int ROW_BYTES = BY_ROWS ? 2 * STEP_DEPTH : 2 * N;  // of the weights in shared memory
  static constexpr int SCRATCH_COLUMNS = 64, SCRATCH = 16 * (SCRATCH_COLUMNS + 8);  // of a warp
  // Bytes, one after the other: the stages, the warps' scratch, the bias in float, the list.
  static constexpr size_t RING = size_t{2} * STAGES * STAGE, SCRATCHES = size_t{2} * 4 * WARPGROUPS * SCRATCH;
  static constexpr size_t FIXED = RING + SCRATCHES + 4 * OUTPUTS;
#if defined(VK_WGMMA)
  using Weights = Operand<ROW_BYTES, BY_ROWS ? Major::FEATURES_SIDE_BY_SIDE : Major::BY_FEATURES>;
#endif
  static_assert(SLOTS <= MASK_BITS &&
                FIXED + 4 * (LIST_HEAD + (MOST_STEPS + STEPS - 1) * ENTRY) <= MAX_SHARED_BYTES);
};

#if defined(VK_WGMMA)

// Copies what stages take, one after another, through all tiles of the block of threads. A thread has, of
// each step, 16 bytes of each of two tokens, and of the weights 16 bytes of each unit that falls to its
// warpgroup. It keeps nothing but its place in the list, the sums leaving few registers.
template <class S, class T>
class StageLoader {
 public:
  VK_DEVICE StageLoader(const int* first, const int* end, int tile) : entry_(first), end_(end), tile_(tile) {}

  // Asks for the next stage; a group is committed in any case.
  VK_DEVICE void load(const Problem<T>& p, const int* first, T* stage) {
    if (entry_ == end_) {
      tile_ += p.tiles;
      entry_ = first;
    }
    if (entry_ != end_ && tile_ * S::TOKENS < static_cast<int>(p.tokens)) {
      const unsigned thread = thread_x(), in_unit = thread % 128;
      const int column = thread % 4 * 8;
      const int* own = entry_ + thread / 128 * S::RECORD;
      // Where this thread's chunks begin, of its tokens and of a unit. Behind the last token that one is read
      // again: what becomes of it is not stored.
      // The compiler shall not take the addresses apart: a chunk's is then one instruction.
      const T *tokens[2], *values;
      VK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int token = tile_ * S::TOKENS + static_cast<int>(thread / 4) + i * X_ROWS;
        const int last = static_cast<int>(p.tokens) - 1;
        const int place = (token < last ? token : last) * static_cast<int>(p.x_row >> 3) + column / 8;
        tokens[i] = p.x + int64_t{place} * 8;
        forget(tokens[i]);
      }
      const int width = (S::BY_ROWS ? p.depth : p.out) >> 3;
      values = p.values +
               int64_t{static_cast<int>(in_unit / CHUNKS) * width + static_cast<int>(in_unit % CHUNKS)} * 8;
      forget(values);
      T* const x = stage + exchanged<64>(thread) * 8;
      T* const weights = stage + S::X + exchanged<S::ROW_BYTES>(thread) * 8;
      VK_UNROLL
      for (int step = 0; step < S::STEPS; ++step) {
        int record[S::RECORD];
        VK_UNROLL
        for (int i = 0; i < S::RECORD; i += 4) {
          const auto part = Vec<int, 4>::load(own + step * S::ENTRY + i);
          VK_UNROLL
          for (int j = 0; j < 4; ++j) record[i + j] = part[j];
        }
        const int place = record[0] >> MASK_BITS, left = p.taken - place * STEP_DEPTH;
        VK_UNROLL
        for (int i = 0; i < 2; ++i)
          cp_async16(x + step * S::STEP + i * X_ROWS * STEP_DEPTH, tokens[i] + int64_t{place} * STEP_DEPTH,
                     column < left);
        VK_UNROLL
        for (int i = 0; i < (S::UNITS + S::WARPGROUPS - 1) / S::WARPGROUPS; ++i) {
          if (record[1 + i] < 0) continue;
          // Of the step's features the first one of the unit's, and this thread's.
          const int first = UNIT_ROWS == 16 ? (thread / 128 + i * S::WARPGROUPS) % 2 * 16 : 0;
          const int row = first + static_cast<int>(in_unit / CHUNKS);
          cp_async16(weights + step * S::STEP + i * S::WARPGROUPS * S::UNIT,
                     values + int64_t{record[1 + i]} * 8, (S::BY_ROWS ? column : row) < left);
        }
      }
      entry_ += S::STEPS * S::ENTRY;
    }
    cp_async_commit();
  }

 private:
  static constexpr int X_ROWS = S::THREADS / 4;
  static constexpr int CHUNKS = S::ROW_BYTES / 16;  // of a row of the weights
  static constexpr int UNIT_ROWS = 128 / CHUNKS;
  static_assert(!S::BY_ROWS || CHUNKS == 4);

  // Where the chunk lies that is number i in a matrix with rows of BYTES.
  template <int BYTES>
  static VK_DEVICE int exchanged(unsigned i) {
    return i / (BYTES / 16) * (BYTES / 16) + chunk_of<BYTES>(i / (BYTES / 16), i % (BYTES / 16));
  }

  const int *entry_, *end_;
  int tile_;
};

// sums += x of a step times the blocks that its mask names. Two neighbours in one product of 2 N columns
// would save nothing but issue slots, and the compiler finds no registers for sums that are used in two ways.
template <class S, class T>
VK_DEVICE void multiply_blocks(float (&sums)[S::SLOTS][S::N / 2], const uint32_t (&x)[2][4],
                               typename S::Weights weights, int mask) {
  constexpr int K_BYTES = S::BY_ROWS ? 32 : 16 * S::ROW_BYTES;
  VK_UNROLL
  for (int slot = 0; slot < S::SLOTS; ++slot) {
    if ((mask >> slot & 1) == 0) continue;
    VK_UNROLL
    for (int k = 0; k < 2; ++k)
      wgmma<T, S::N>(sums[slot], x[k], weights.advance(2 * S::SLOT * slot + K_BYTES * k));
  }
}

// One branch for all of them, whose chains of operations then run side by side.
template <class T, int COUNT>
VK_DEVICE void activate_all(float (&values)[COUNT], Activation activation) {
  if (activation == Activation::gelu) {
    VK_UNROLL
    for (float& value : values) value = activate<T>(value, Activation::gelu);
  } else if (activation == Activation::relu) {
    VK_UNROLL
    for (float& value : values) value = activate<T>(value, Activation::relu);
  }
}

// The warp's 16 tokens to rows of y, or to `before` where not `after` the activation, 64 columns at a time
// through shared memory, so that 16 bytes go out at a time.
template <class S, class T>
VK_DEVICE void store_tokens(const float (&sums)[S::SLOTS][S::N / 2], const Problem<T>& p, bool after,
                            int tile) {
  constexpr int LD = S::SCRATCH_COLUMNS + 8;
  int thread = thread_x();
  forget(thread);
  const int g = thread % 32 / 4, t = thread % 4;
  T* const scratch = reinterpret_cast<T*>(shared_memory() + S::RING) + thread / 32 * S::SCRATCH;
  const float* bias = reinterpret_cast<const float*>(shared_memory() + S::RING + S::SCRATCHES);
  const Activation activation = after ? p.activation : Activation::none;
  T* const y = after ? p.y : p.before;
  const int64_t y_row = after ? p.y_row : p.before_row;
  const bool vectors = after ? p.y_vectors : p.before_vectors;
  VK_UNROLL
  for (int part = 0; part < S::OUTPUTS; part += S::SCRATCH_COLUMNS) {
    VK_UNROLL
    for (int c = part; c < part + S::SCRATCH_COLUMNS; c += 16) {
      float values[8];  // of 8 columns and the next 8; for each rows g and g + 8, two values side by side
      VK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const auto added = Vec<float, 2>::load(bias + c + 8 * i + 2 * t);
        VK_UNROLL
        for (int j = 0; j < 4; ++j)
          values[4 * i + j] = sums[c / S::N][c % S::N / 2 + 4 * i + j] + added[j % 2];
      }
      activate_all<T>(values, activation);
      VK_UNROLL
      for (int i = 0; i < 4; ++i)
        Vec<T, 2>{{from_float<T>(values[2 * i]), from_float<T>(values[2 * i + 1])}}.store(
            scratch + (g + i % 2 * 8) * LD + c - part + i / 2 * 8 + 2 * t);
    }
    sync_warp();
    // Found anew for each part, there being no registers to keep addresses in.
    int lane = thread;
    forget(lane);
    const int row = lane % 32 / 8, column = lane % 8 * 8, token = tile * S::TOKENS + lane / 32 * 16 + row;
    const int tokens = static_cast<int>(p.tokens) - token, output = block_x() * S::OUTPUTS + part + column;
    const int count = p.given - output;
    const T* from = scratch + row * LD + column;
    T* to = y + int64_t{token} * y_row + output;
    if (vectors) {
      VK_UNROLL
      for (int i = 0; i < 16; i += 4, to += 4 * y_row)
        if (i < tokens && count > 0) Vec<T, 8>::load(from + i * LD).store(to);
    } else {
      VK_NO_UNROLL
      for (int i = 0; i < 16 && i < tokens; i += 4) {
        VK_NO_UNROLL
        for (int e = 0; e < 8 && e < count; ++e) to[i * y_row + e] = from[i * LD + e];
      }
    }
    sync_warp();
  }
}

template <class S, class T>
VK_DEVICE void warpgroup_product(const Problem<T>& p, const int* entries, int ints) {
  constexpr int STAGES = S::STAGES;
  T* const stages = reinterpret_cast<T*>(shared_memory());
  float* const bias = reinterpret_cast<float*>(shared_memory() + S::RING + S::SCRATCHES);
  int* const list = reinterpret_cast<int*>(shared_memory() + S::FIXED);
  const int first_output = block_x() * S::OUTPUTS;
  VK_NO_UNROLL
  for (int i = thread_x(); i < ints; i += S::THREADS)
    list[i] = entries[static_cast<int64_t>(block_x()) * ints + i];
  VK_NO_UNROLL
  for (int i = thread_x(); i < S::OUTPUTS; i += S::THREADS)
    bias[i] = p.bias != nullptr && first_output + i < p.given ? to_float(p.bias[first_output + i]) : 0.0f;
  sync_block();

  const int *const first = list + LIST_HEAD, *const end = first + list[0] * S::ENTRY;
  StageLoader<S, T> loader(first, end, block_y());
  VK_NO_UNROLL
  for (int stage = 0; stage < STAGES - 1; ++stage) loader.load(p, first, stages + stage * S::STAGE);
  // Of the warp's x, the place of this lane's row in the first 16 features; the others are two chunks on.
  const int row = warp_id() * 16 + lane_id() % 16, chunk = lane_id() / 16;
  const int x_first = row * STEP_DEPTH + chunk_of<64>(row, chunk) * 8;

  const typename S::Weights first_weights(stages + S::X, 2 * S::SLOT);
  typename S::Weights weights = first_weights;  // of this stage
  int place = 0;
  VK_NO_UNROLL
  for (int tile = block_y(); tile * S::TOKENS < static_cast<int>(p.tokens); tile += p.tiles) {
    float sums[S::SLOTS][S::N / 2];
    VK_UNROLL
    for (auto& slot : sums) {
      VK_UNROLL
      for (float& sum : slot) sum = 0.0f;
      hold(slot);
    }
    VK_NO_UNROLL
    for (const int* entry = first; entry != end; entry += S::STEPS * S::ENTRY) {
      cp_async_wait<STAGES - 2>();
      fence_async_proxy();
      // The products of the stage before, all of them: how many groups a stage makes of its products depends
      // on its masks, so that a number of groups to leave in flight would not say which.
      wgmma_wait<0>();
      // The stage is there for all, and all are done with the one before, with its products and with reading
      // x: the copies that this stage asks for below may overwrite it.
      sync_block();
      // The copies are asked for while the first step's products run. The second step waits for those, which
      // costs little: warpgroups need not meet there, and the products of the others run meanwhile. Without
      // it the compiler finds no registers for two steps' x.
      VK_UNROLL
      for (int step = 0; step < S::STEPS; ++step) {
        if (step > 0) wgmma_wait<0>();
        uint32_t x[2][4];
        ldmatrix_x4(x[0], stages + place + x_first + step * S::STEP);
        ldmatrix_x4(x[1], stages + place + (x_first ^ 16) + step * S::STEP);
        wgmma_fence();
        multiply_blocks<S, T>(sums, x, weights.advance(2 * step * S::STEP), entry[step * S::ENTRY]);
        wgmma_commit();
        if (step == 0)
          loader.load(p, first, stages + (place == 0 ? (STAGES - 1) * S::STAGE : place - S::STAGE));
      }
      place += S::STAGE;
      weights = weights.advance(2 * S::STAGE);
      if (place == S::STAGE * STAGES) {
        place = 0;
        weights = first_weights;
      }
    }
    wgmma_wait<0>();
    VK_UNROLL
    for (auto& slot : sums) hold(slot);

    VK_NO_UNROLL
    for (int result = p.before == nullptr ? 1 : 0; result < 2; ++result)
      store_tokens<S>(sums, p, result == 1, tile);
  }
}

#endif

template <class T, bool BY_ROWS, int N, int SLOTS, int WARPGROUPS>
VK_KERNEL void VK_LAUNCH_BOUNDS(128 * WARPGROUPS, 1)
    warpgroup_product_kernel(Problem<T> p, const int* entries, int ints) {
#if defined(VK_WGMMA)
  warpgroup_product<WarpgroupShape<BY_ROWS, N, SLOTS, WARPGROUPS>>(p, entries, ints);
#else
  (void)p, (void)entries, (void)ints;  // other devices take the other kernel
#endif
}

}  // namespace vitkernels::block_sparse_linear
