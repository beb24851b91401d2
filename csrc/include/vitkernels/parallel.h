// Parallel loops for the CPU kernels, on the threads PyTorch already has.
//
// PyTorch's OpenMP workers spin for a while after each parallel region, so a second pool in the process
// would fight them for the same cores. The extension therefore does not link an OpenMP of its own: it
// looks up the runtime that libtorch_cpu resolves to (or, failing that, any OpenMP runtime in the
// process) and runs its loops on that team. Without one it keeps a small pool of std::threads.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace vitkernels {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end, int slot);

// Calls fn on contiguous ranges that partition [0, n), at most one range a slot, slots in [0, threads).
// fn must not throw. Runs in the calling thread when threads <= 1 or inside another parallel region.
//
// With a chunk, ranges are of at most so many items, any number of them a slot: its own share comes first,
// then what others have left of theirs. Processors that run at different speeds, or that other programs want
// too, then end at the same time. What is computed must not depend on where ranges begin.
void parallel_for(int64_t n, int threads, RangeFn fn, void* context, int64_t chunk = 0);

// A chunk for so much work (floating-point operations): some in each share, and none too small to be worth
// it.
int64_t worthwhile_chunk(double work, int64_t items, int threads);

// Where the members of a team wait for each other. Spins, since the work between two waits is microseconds,
// and yields to whoever else wants the processor when that takes long.
class TeamBarrier {
 public:
  void wait(int size);

 private:
  std::atomic<int> arrived_{0}, phase_{0};
};

using TeamFn = void (*)(void* context, int rank, int size, TeamBarrier& barrier);

// Calls fn once on each member of a team of at most `threads` threads, all of which run at the same time, so
// that they may wait for each other. fn must not throw. A team of one where parallel_for would run serially.
void parallel_team(int threads, TeamFn fn, void* context);

// How many threads `work` (floating-point operations) is worth, at most `threads`.
int worthwhile_threads(double work, int64_t items, int threads);

// Memory of the calling thread, 64-byte aligned and uninitialised, valid until its next call.
// Throws std::bad_alloc.
void* thread_scratch(size_t bytes);

// Path of the OpenMP runtime in use; empty when the loops run on the pool.
const char* openmp_runtime();

}  // namespace vitkernels
