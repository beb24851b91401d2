// The product of the tokens with the block-sparse weight on Hopper's tensor cores: what forward.cu's kernel
// does, for half precision and blocks with sides of 32, 64 or 128.
//
// A block of threads computes tiles of TOKENS tokens x OUTPUTS outputs, one after another for one group of
// outputs. A warpgroup has 64 of the tokens and all of the outputs: all multiply with the same stored blocks,
// so that rows of different population unbalance nothing. A tile goes through the group's list
// (step_lists.h), 32 features a step: x comes to registers once a step (ldmatrix), and each block that exists
// is two products of N columns. Copies run STAGES - 2 steps ahead, over the end of a tile into the next one,
// whose first steps arrive while this one is stored. A step's products run while the warpgroup passes the
// next step's barrier.
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

template <bool BY_ROWS_, int N_, int SLOTS_, int WARPGROUPS_>
struct WarpgroupShape {
  static constexpr bool BY_ROWS = BY_ROWS_;
  static constexpr int N = N_, SLOTS = SLOTS_, WARPGROUPS = WARPGROUPS_, THREADS = 128 * WARPGROUPS;
  static constexpr int TOKENS = 64 * WARPGROUPS, OUTPUTS = N * SLOTS, STAGES = WARPGROUPS == 1 ? 5 : 6;
  // In elements. A slot's weights are [N][32], or [32][N] where rows are summed over.
  static constexpr int X = TOKENS * STEP_DEPTH, SLOT = N * STEP_DEPTH, STAGE = X + OUTPUTS * STEP_DEPTH;
  static constexpr int ROW_BYTES = BY_ROWS ? 2 * STEP_DEPTH : 2 * N;  // of the weights in shared memory
  static constexpr int SCRATCH_COLUMNS = 64, SCRATCH = 16 * (SCRATCH_COLUMNS + 8);  // of a warp
  // Bytes, one after the other: the stages, the warps' scratch, the bias in float, the list.
  static constexpr size_t RING = size_t{2} * STAGES * STAGE, SCRATCHES = size_t{2} * 4 * WARPGROUPS * SCRATCH;
  static constexpr size_t FIXED = RING + SCRATCHES + 4 * OUTPUTS;
#if defined(VK_WGMMA)
  using Weights = Operand<ROW_BYTES, BY_ROWS ? Major::FEATURES_SIDE_BY_SIDE : Major::BY_FEATURES>;
#endif
  static_assert(SLOTS <= MASK_BITS && FIXED + 4 * (MOST_STEPS + 1) * (1 + SLOTS) <= MAX_SHARED_BYTES);
};

#if defined(VK_WGMMA)

// Copies what steps take, one after another, through all tiles of the block of threads. A thread has 16 bytes
// of each of two tokens, and of the weights the same 16 bytes or two of every slot that falls to its
// warpgroup. It keeps little, the sums leaving few registers; places follow from the thread's number.
template <class S, class T>
class StepLoader {
 public:
  VK_DEVICE StepLoader(const int* list, int tile) : entry_(list), tile_(tile) {}

  // Asks for the next step; a group is committed in any case.
  VK_DEVICE void load(const Problem<T>& p, const int* list, T* stage) {
    int head = entry_[0];
    if (head == 0) {
      tile_ += p.tiles;
      entry_ = list;
      head = entry_[0];
    }
    int thread = thread_x();
    forget(thread);
    const int tokens = static_cast<int>(p.tokens), token = tile_ * S::TOKENS;
    if (head != 0 && token < tokens) {
      const int place = (head >> MASK_BITS) * STEP_DEPTH, left = p.taken - place, column = thread % 4 * 8;
      T* to = stage + exchanged<64>(thread) * 8;
      VK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int own = token + thread / 4 + i * X_ROWS;
        cp_async16(to + i * X_ROWS * STEP_DEPTH,
                   p.x + (int64_t{own} * static_cast<int>(p.x_row) + (place + column)),
                   column < left && own < tokens);
      }
      const int in_group = thread % 128, row = in_group / CHUNKS, width = S::BY_ROWS ? p.depth : p.out;
      const int inside = row * width + in_group % CHUNKS * 8;
      T* weights = stage + S::X + exchanged<S::ROW_BYTES>(in_group) * 8 + thread / 128 * S::SLOT;
      VK_UNROLL
      for (int i = 0; i < (S::SLOTS + S::WARPGROUPS - 1) / S::WARPGROUPS; ++i) {
        const int slot = thread / 128 + i * S::WARPGROUPS;
        if ((head >> slot & 1) == 0 || slot >= S::SLOTS) continue;
        const T* from = p.values + (static_cast<int64_t>(entry_[1 + slot]) * 8 + inside);
        VK_UNROLL
        for (int pass = 0; pass < S::N / 32; ++pass)
          cp_async16(weights + i * S::WARPGROUPS * S::SLOT + pass * PASS_ROWS * CHUNKS * 8,
                     from + pass * PASS_ROWS * width, (S::BY_ROWS ? column : row + pass * PASS_ROWS) < left);
      }
      entry_ += 1 + S::SLOTS;
    }
    cp_async_commit();
  }

 private:
  static constexpr int X_ROWS = S::THREADS / 4;
  // Of the weights: a row's chunks, the rows that a warpgroup copies in one go.
  static constexpr int CHUNKS = S::ROW_BYTES / 16, PASS_ROWS = 128 / CHUNKS;
  static_assert(!S::BY_ROWS || CHUNKS == 4);

  // Where the chunk lies that is number i in a matrix with rows of BYTES.
  template <int BYTES>
  static VK_DEVICE int exchanged(int i) {
    return i / (BYTES / 16) * (BYTES / 16) + chunk_of<BYTES>(i / (BYTES / 16), i % (BYTES / 16));
  }

  const int* entry_;
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

// The warp's 16 tokens to rows of y, or to `before` where not `after` the activation, 64 columns at a time
// through shared memory, so that 16 bytes go out at a time.
template <class S, class T>
VK_DEVICE void store_tokens(const float (&sums)[S::SLOTS][S::N / 2], const Problem<T>& p, bool after,
                            int tile) {
  constexpr int LD = S::SCRATCH_COLUMNS + 8;
  int thread = thread_x();
  forget(thread);
  const int lane = thread % 32, g = lane / 4, t = lane % 4, row = lane / 8, column = lane % 8 * 8;
  const int first_token = tile * S::TOKENS + thread / 32 * 16, first_output = block_x() * S::OUTPUTS;
  T* const scratch = reinterpret_cast<T*>(shared_memory() + S::RING) + thread / 32 * S::SCRATCH;
  const float* bias = reinterpret_cast<const float*>(shared_memory() + S::RING + S::SCRATCHES);
  const Activation activation = after ? p.activation : Activation::none;
  T* const y = after ? p.y : p.before;
  const int64_t y_row = after ? p.y_row : p.before_row;
  const bool vectors = after ? p.y_vectors : p.before_vectors;
  VK_UNROLL
  for (int part = 0; part < S::OUTPUTS; part += S::SCRATCH_COLUMNS) {
    VK_UNROLL
    for (int c = part; c < part + S::SCRATCH_COLUMNS; c += 8) {
      const float* own = sums[c / S::N] + c % S::N / 2;
      const auto added = Vec<float, 2>::load(bias + c + 2 * t);
      VK_UNROLL
      for (int half = 0; half < 2; ++half)
        Vec<T, 2>{{from_float<T>(activate<T>(own[2 * half] + added[0], activation)),
                   from_float<T>(activate<T>(own[2 * half + 1] + added[1], activation))}}
            .store(scratch + (g + 8 * half) * LD + c - part + 2 * t);
    }
    sync_warp();
    const int count = p.given - first_output - part - column;
    VK_NO_UNROLL
    for (int i = 0; i < 16; i += 4) {
      const int token = first_token + row + i;
      if (token >= p.tokens || count <= 0) continue;
      const auto values = Vec<T, 8>::load(scratch + (row + i) * LD + column);
      T* to = y + int64_t{token} * y_row + first_output + part + column;
      if (vectors) {
        values.store(to);
        continue;
      }
      VK_UNROLL
      for (int e = 0; e < 8; ++e)
        if (e < count) to[e] = values[e];
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

  StepLoader<S, T> loader(list, block_y());
  VK_NO_UNROLL
  for (int step = 0; step < STAGES - 2; ++step) loader.load(p, list, stages + step * S::STAGE);
  // Of the warp's x, the place of this lane's row in the first 16 features; the others are two chunks on.
  const int row = warp_id() * 16 + lane_id() % 16, chunk = lane_id() / 16;
  const int x_first = row * STEP_DEPTH + chunk_of<64>(row, chunk) * 8;
  const typename S::Weights weights(stages + S::X, 2 * S::SLOT);  // of the first stage

  int place = 0;  // of this step's stage
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
    for (const int* entry = list;; entry += 1 + S::SLOTS) {
      const int mask = entry[0] & ((1 << MASK_BITS) - 1);
      if (mask == 0) break;
      cp_async_wait<STAGES - 3>();
      fence_async_proxy();
      // The stage is there for all, and for all the products of the step before the last are done.
      sync_block();
      // The last step's, all of them: how many groups a step makes of its products depends on its mask, so
      // that a number of groups to leave in flight would not say which. They read x from registers until they
      // are done.
      wgmma_wait<0>();
      uint32_t x[2][4];
      ldmatrix_x4(x[0], stages + place + x_first);
      ldmatrix_x4(x[1], stages + place + (x_first ^ 16));
      wgmma_fence();
      multiply_blocks<S, T>(sums, x, weights.advance(2 * place), mask);
      wgmma_commit();
      loader.load(p, list,
                  stages + (place >= 2 * S::STAGE ? place - 2 * S::STAGE : place + (STAGES - 2) * S::STAGE));
      place = place == (STAGES - 1) * S::STAGE ? 0 : place + S::STAGE;
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
