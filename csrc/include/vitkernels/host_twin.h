// The layer's host twin: the names of cuda_instructions.h on fibers, for tests without a GPU.
//
// What it makes visible: a missing barrier (warps and lanes run in an order shuffled from a seed, as far
// ahead of each other as the barriers allow; and, whatever the order, every access is held to the barriers
// before it: csrc/twin/watch.h), shared memory read before it is written or before its cp.async has been
// waited for (NaN), writes outside shared memory, misaligned vector accesses, diverged warp collectives, bank
// conflicts and sectors fetched in vain (csrc/twin/traffic.h). What it cannot see: time; rounding inside the
// tensor core. Included through device.h; the scheduler is csrc/twin/scheduler.cpp.
#pragma once
#include <stdexcept>
#include <string>

#include "vitkernels/dtypes.h"

// What the twin does in a thread's name is no access of the kernel (csrc/twin/watch.h).
#if defined(__SANITIZE_THREAD__)
#define VK_UNWATCHED __attribute__((no_sanitize_thread))
#else
#define VK_UNWATCHED
#endif

namespace vitkernels {

namespace twin {

struct GridSize {
  int64_t x, y, z;
};

// Where the running thread stands.
struct Position {
  int thread;
  int block_dim;
  int block_x, block_y, block_z;
  int grid_x;
  char* shared;
  size_t shared_bytes;
};
const Position& here();

// `thread` is called once by every thread of every block. Runs one kernel type-erased; see launch().
struct ThreadBody {
  void (*call)(const void*);
  const void* closure;
};
void run_grid(const void* kernel, GridSize grid, int threads, size_t shared_bytes, ThreadBody thread);

template <typename F>
void run_grid(const void* kernel, GridSize grid, int threads, size_t shared_bytes, const F& thread) {
  run_grid(kernel, grid, threads, shared_bytes,
           ThreadBody{[](const void* closure) { (*static_cast<const F*>(closure))(); }, &thread});
}

void set_seed(uint64_t seed);
// Of the device that the twin stands for, by which some kernels choose their tiles.
int processors();
void set_processors(int count);

// Blocks until all 32 lanes are here with the same `body`; it then runs once, on what each lane handed in.
using CollectiveBody = void (*)(void* const* lanes);
constexpr char SYNC_WARP[] = "sync_warp";  // the one that orders memory
void collective(const char* name, CollectiveBody body, void* mine);
void wait_block();

void copy_async(void* smem, const void* gmem, int bytes, bool valid);
void commit_copies();
void wait_copies(int in_flight);

[[noreturn]] void fail(const std::string& what);
void check_aligned(const void* pointer, size_t bytes, const char* what);
void check_shared(const void* pointer, size_t bytes, const char* what);
// A lane of the running thread's warp reads a row of an ldmatrix.
void note_row(int lane, const void* row);
// A lane of the running thread's warp reads 16 bytes of shared memory in a product that goes on until the
// lane has waited for the group that it commits next.
void note_product_read(int lane, const void* place);
// The lane's sums, in the same product; it has called fence_products() since touch_sums() or its start.
void note_product_sums(int lane, const float* sums);
void commit_products();
void wait_products(int in_flight);
void fence_products();
// The running thread reads or writes sums, of which no product may be on its way.
void touch_sums(const float* sums);
// What the running thread wrote to shared memory products see after the next barrier.
void fence_writes();
// 16 bytes that the copy engine brings: poison until a thread waits for the barrier of copies.
void copy_by_engine(void* smem, const void* bytes, const void* arrival);
void land_copies_of_engine(const void* arrival);

template <typename T>
struct Exchange {
  T value;
  int from;
  T result;
};

template <typename T>
VK_UNWATCHED T exchange(const char* name, T value, int from) {
  Exchange<T> mine{value, from, value};
  collective(
      name,
      [](void* const* lanes) VK_UNWATCHED {
        for (int lane = 0; lane < 32; ++lane) {
          auto* self = static_cast<Exchange<T>*>(lanes[lane]);
          self->result = static_cast<const Exchange<T>*>(lanes[self->from & 31])->value;
        }
      },
      &mine);
  return mine.result;
}

struct MatrixOperands {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <typename T>
VK_UNWATCHED float unpack(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}

template <typename T>
VK_UNWATCHED void multiply_tiles(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<const MatrixOperands*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int which = 0; which < 2; ++which) {
      for (int i = 0; i < 4; ++i)
        a[g + 8 * (i % 2)][2 * t + which + 8 * (i / 2)] = unpack<T>(mine->a[i], which);
      for (int i = 0; i < 2; ++i) b[2 * t + which + 8 * i][g] = unpack<T>(mine->b[i], which);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const MatrixOperands*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      d[i] = sum;
    }
  }
}

struct MatrixRow {
  uint32_t* r;
  const void* row;
};

template <int tiles, bool transposed>
VK_UNWATCHED void load_matrices(void* const* lanes) {
  uint16_t tile[tiles][8][8];
  for (int lane = 0; lane < 8 * tiles; ++lane) {
    const void* row = static_cast<const MatrixRow*>(lanes[lane])->row;
    check_aligned(row, 16, "the row address of an ldmatrix");
    check_shared(row, 16, "the row of an ldmatrix");
    note_row(lane, row);
    std::memcpy(tile[lane / 8][lane % 8], row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int i = 0; i < tiles; ++i) {
      const uint32_t lo = transposed ? tile[i][t][g] : tile[i][g][t];
      const uint32_t hi = transposed ? tile[i][t + 1][g] : tile[i][g][t + 1];
      static_cast<const MatrixRow*>(lanes[lane])->r[i] = lo | hi << 16;
    }
  }
}

}  // namespace twin

VK_UNWATCHED inline int thread_x() {
  return twin::here().thread;
}
VK_UNWATCHED inline int block_dim_x() {
  return twin::here().block_dim;
}
VK_UNWATCHED inline int block_x() {
  return twin::here().block_x;
}
VK_UNWATCHED inline int block_y() {
  return twin::here().block_y;
}
VK_UNWATCHED inline int block_z() {
  return twin::here().block_z;
}
VK_UNWATCHED inline int grid_x() {
  return twin::here().grid_x;
}
VK_UNWATCHED inline int lane_id() {
  return twin::here().thread & 31;
}
VK_UNWATCHED inline int warp_id() {
  return twin::here().thread >> 5;
}
VK_UNWATCHED inline char* shared_memory() {
  return twin::here().shared;
}

inline void forget(int&) {}
template <class T>
void forget(T*&) {}

// Inline for sure: what a kernel calls is known by where it calls it.
#define VK_INLINE __attribute__((always_inline)) inline

VK_INLINE void sync_block() {
  twin::wait_block();
}
VK_INLINE void sync_warp() {
  twin::collective(twin::SYNC_WARP, [](void* const*) {}, nullptr);
}

// Launches run one after another here.
inline void admit_launch() {}
inline void wait_for_launch() {}

template <typename T>
T shfl(T value, int lane) {
  return twin::exchange("shfl", value, lane);
}
// A source beyond the group of `width` lanes gives the lane's own value.
template <typename T>
T shfl_xor(T value, int mask, int width = 32) {
  const int lane = lane_id(), from = lane ^ mask;
  return twin::exchange("shfl_xor", value, from > (lane | (width - 1)) ? lane : from);
}
template <typename T>
T shfl_down(T value, int delta) {
  const int lane = lane_id();
  return twin::exchange("shfl_down", value, lane + delta > 31 ? lane : lane + delta);
}

template <typename T>
VK_UNWATCHED T atomic_add(T* target, T value) {
  static_assert(std::is_integral_v<T>, "float atomics would make the result depend on the schedule");
  const T before = *target;
  *target = before + value;
  return before;
}

template <typename T, int N>
VK_INLINE Vec<T, N> Vec<T, N>::load(const T* source) {
  twin::check_aligned(source, sizeof(Vec), "a vector load");
  Vec result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}
template <typename T, int N>
VK_INLINE void Vec<T, N>::store(T* target) const {
  twin::check_aligned(target, sizeof(Vec), "a vector store");
  std::memcpy(static_cast<void*>(target), this, sizeof(Vec));
}

template <class Acc>
Acc larger(Acc x, Acc maximum) {
  return x > maximum ? x : maximum;
}
inline float at_most(float x, float bound) {
  return x > bound ? bound : x;
}
inline float flush_subnormal(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x;
}
inline float exp2_fast(float x) {
  return flush_subnormal(std::exp2(flush_subnormal(x)));
}
inline float log2_fast(float x) {
  return std::log2(flush_subnormal(x));
}
inline float reciprocal_fast(float x) {
  return flush_subnormal(1.0f / flush_subnormal(x));
}
inline float exp_(float x) {
  return std::exp(x);
}
inline double exp_(double x) {
  return std::exp(x);
}
inline float log_(float x) {
  return std::log(x);
}
inline double log_(double x) {
  return std::log(x);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  twin::MatrixOperands mine{d, a, b};
  twin::collective("mma_m16n8k16", twin::multiply_tiles<T>, &mine);
}

VK_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  twin::MatrixRow mine{r, row};
  twin::collective("ldmatrix_x4", twin::load_matrices<4, false>, &mine);
}
VK_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  twin::MatrixRow mine{r, row};
  twin::collective("ldmatrix_x4_trans", twin::load_matrices<4, true>, &mine);
}
VK_INLINE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  twin::MatrixRow mine{r, row};
  twin::collective("ldmatrix_x2", twin::load_matrices<2, false>, &mine);
}
VK_INLINE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  twin::MatrixRow mine{r, row};
  twin::collective("ldmatrix_x2_trans", twin::load_matrices<2, true>, &mine);
}

VK_INLINE void cp_async16(void* smem, const void* gmem, bool valid = true) {
  twin::copy_async(smem, gmem, 16, valid);
}
VK_INLINE void cp_async8(void* smem, const void* gmem, bool valid = true) {
  twin::copy_async(smem, gmem, 8, valid);
}
inline void cp_async_commit() {
  twin::commit_copies();
}
template <int N>
VK_INLINE void cp_async_wait() {
  twin::wait_copies(N);
}

}  // namespace vitkernels
