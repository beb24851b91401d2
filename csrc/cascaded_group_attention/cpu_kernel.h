// Between cpu.cpp, compiled once, and cpu_kernel.cpp, compiled once per instruction set.
#pragma once
#include <stddef.h>

#include "cascaded_group_attention.h"

namespace vitkernels::cascaded_group_attention {

// The threads that work on one group of windows together. A team of one never waits.
struct Team {
  int rank, size;
  void* barrier;
  void (*wait_at)(void* barrier, int size);

  void wait() const {
    if (size > 1) wait_at(barrier, size);
  }
  // This member's share [begin, end) of n things.
  int begin(int n) const { return static_cast<int>(static_cast<int64_t>(n) * rank / size); }
  int end(int n) const { return static_cast<int>(static_cast<int64_t>(n) * (rank + 1) / size); }
};

// Memory is 64-byte aligned. `shared` is seen by all threads, `group` by the team, `own` by one thread. What
// is computed for a window depends neither on its group nor on the team, so results do not depend on threads.
struct CpuKernel {
  // Weights in the form the kernels read; a team of all threads fills it and waits. 0 bytes: as they lie.
  size_t (*weights_size)(const Params&);
  void (*prepare)(const Params&, void* shared, const Team& all);

  size_t (*forward_group_size)(const Params&, int windows);
  size_t (*forward_own_size)(const Params&, int windows);
  // Windows [first, first + count); `fresh` the first time that a thread hands in its `own`.
  void (*forward)(const Params&, const void* shared, void* group, void* own, int64_t first, int count,
                  const Team& team, bool fresh);

  // Windows [first, first + count) in groups of `group`, on one thread; their shares of the weight gradients
  // go to `partial`. reduce adds `chunks` of those up in order, for the rows [begin, end) of reduce_rows.
  size_t (*backward_partial_size)(const Params&);
  size_t (*backward_own_size)(const Params&, int group);
  void (*backward)(const Params&, const void* shared, void* own, void* partial, int64_t first, int64_t count,
                   int group);
  int (*reduce_rows)(const Params&);
  void (*reduce)(const Params&, const char* partials, size_t partial_size, int chunks, int begin, int end);
};

namespace baseline {
extern const CpuKernel kKernel;
}
namespace avx2 {
extern const CpuKernel kKernel;
}
namespace avx512 {
extern const CpuKernel kKernel;
}

}  // namespace vitkernels::cascaded_group_attention
