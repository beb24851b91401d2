#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::block_sparse_linear {
namespace {

const CpuKernel& kernel() {
#ifdef VITKERNELS_X86_ISAS
  if (selected_isa() == Isa::avx512) return avx512::kKernel;
  if (selected_isa() == Isa::avx2) return avx2::kKernel;
#endif
  return baseline::kKernel;
}

size_t aligned(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// One call: its memory, and what each thread does.
class Call {
 public:
  Call(const Params& params, bool backward)
      : p_(params), cpu_(kernel()), backward_(backward), plan_(cpu_.plan(params, backward)) {}

  void run(int threads) {
    const double product = 2.0 * p_.tokens * p_.nnz * p_.block_height * p_.block_width;
    const double moved = 4.0 * p_.tokens * (p_.in_features + p_.out_features);
    threads = worthwhile_threads(product + moved, p_.tokens * p_.given(), threads);
    const size_t weights = aligned(plan_.weights), slice = aligned(plan_.inputs) + aligned(plan_.outputs);
    const size_t slices = slice * (plan_.slices > 1 ? 2 : 1);
    memory_ = static_cast<char*>(thread_scratch(weights + slices + aligned(plan_.thread) * threads));
    slices_ = memory_ + weights;
    threads_ = slices_ + slices;
    parallel_team(
        threads,
        [](void* context, int rank, int size, TeamBarrier& barrier) {
          static_cast<const Call*>(context)->member(rank, size, barrier);
        },
        this);
  }

 private:
  void member(int rank, int size, TeamBarrier& barrier) const {
    for (int64_t s = 0; s < plan_.slices; ++s) {
      // A buffer is packed again when every thread has waited for the slice between, hence left it.
      char* slice = slices_ + s % 2 * (aligned(plan_.inputs) + aligned(plan_.outputs));
      const Shared shared{slice, slice + aligned(plan_.inputs), memory_};
      const Part part{s, rank, size};
      cpu_.pack(p_, backward_, plan_, part, shared);
      barrier.wait(size);
      cpu_.multiply(p_, backward_, plan_, part, shared, threads_ + rank * aligned(plan_.thread));
    }
  }

  const Params& p_;
  const CpuKernel& cpu_;
  bool backward_;
  Plan plan_;
  char *memory_ = nullptr, *slices_ = nullptr, *threads_ = nullptr;
};

}  // namespace

void forward_cpu(const Params& p, int threads) {
  Call(p, false).run(threads);
}

void backward_cpu(const Params& p, int threads) {
  Call(p, true).run(threads);
}

}  // namespace vitkernels::block_sparse_linear
