// Every access of a kernel to memory, held to the barriers between it and the accesses of other threads.
//
// The kernels are compiled with g++ -fsanitize=thread, which calls a function before each access; watch.cpp
// is that function, in place of the sanitizer's own runtime, which knows nothing of warps. Two accesses of
// one place, at least one of them a write, by two threads
//   * of one block are ordered by a sync_block between them, those of one warp by a sync_warp too, and by
//     nothing else: a shuffle, an ldmatrix or an mma brings lanes together but promises no memory order;
//   * of two blocks are ordered by nothing: a launch's blocks run in any order.
// What is not ordered is a hazard, whatever the schedule at hand makes of it. So is an access by anybody to
// the target of a cp.async between the copy's issue and its wait. A wgmma reads shared memory until its wait,
// and sees what a thread wrote, other than by the copy engine, after a fence_async_proxy() by that thread and
// then a sync_block.
//
// Places are two bytes. What is not seen: an atomic, which no kernel has so far; the order of global memory
// between launches, which is the stream's.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vitkernels::twin::watch {

void begin_launch();
void begin_block(const char* shared, size_t bytes);
// From here on accesses are those of this thread; its own stack is nobody else's concern.
void run_thread(int thread, const char* stack, size_t stack_bytes);
// From here on they are the host's, which launches.
void run_host();
// The warp's lanes met in the sync_warp at `code`; the block's threads in a sync_block, each in the one at
// its own `code`, null where it has exited.
void order_warp(int warp, const void* code);
void order_block(const std::vector<const void*>& codes);

// Reads first, then writes.
enum class Access { read, read_over, product_read, write, engine_write, copy_issued, copy_landed };
// By the thread given, from `code`.
void note(int thread, const void* address, size_t bytes, Access access, const void* code);
// Times are counted up from one launch to the next, so that what is older than a launch or a block shows by
// itself and nothing is ever cleared.
using Time = uint32_t;
// A product that began in interval() `since` reads no more: what it read is as it was then.
Time interval();
void note_read_over(int thread, const void* address, size_t bytes, Time since, const void* code);

// The thread called fence_async_proxy().
void fence_writes(int thread);

// What the launch's first hazard is, with the lines of both accesses; empty: none so far.
std::string hazard();

// ---- for tests

// Whether hazards are looked for; they are from the start.
void set_enabled(bool enabled);
struct Barrier {
  uint32_t code;
  bool of_warp;
  std::string line;
};
// Those that any launch has met so far.
std::vector<Barrier> barriers();
// As if these barriers were not there, except that threads wait in them all the same.
void ignore_barriers(const std::vector<uint32_t>& codes);

}  // namespace vitkernels::twin::watch
