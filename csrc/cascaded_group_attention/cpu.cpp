#include <algorithm>
#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::cascaded_group_attention {
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

double products(const Params& p) {
  const double n = p.tokens(), k = p.key_dim, d = p.value_dim(), h = p.num_heads, c = p.channels;
  return 2.0 * static_cast<double>(p.windows()) * n * (h * (p.qkv_rows() * d + (k + d) * n) + c * c);
}

// Windows of a group: where whole vectors hold their tokens with the least left over, but so few that their
// matrices stay near the second-level cache.
int group_windows(const Params& p) {
  constexpr int64_t kVector = 16, kLanes = 208, kElements = 150000;
  const int64_t n = p.tokens(), rows = 2 * p.channels + p.qkv_rows() + p.value_dim() + p.key_dim;
  int64_t best = 1;
  const auto padded = [&](int64_t windows) { return (windows * n + kVector - 1) / kVector * kVector; };
  for (int64_t windows = 2; windows * n <= kLanes && windows * n * rows <= kElements; ++windows)
    if (padded(windows) * best < padded(best) * windows) best = windows;
  return static_cast<int>(best);
}

// Who works on what. Windows are dealt out to the threads, or, when there are fewer than threads, all threads
// share all windows.
struct Plan {
  int threads, group;
  bool together;

  Plan(const Params& p, double work, int wanted) {
    threads = worthwhile_threads(work, INT64_MAX, wanted);
    together = p.windows() < threads;
    group = together ? static_cast<int>(p.windows()) : group_windows(p);
  }
};

struct Call {
  const Params& p;
  const CpuKernel& cpu;
  Plan plan;
  char *weights, *groups, *owns;
  size_t weights_size, group_size, own_size;

  void member(int rank, int size, TeamBarrier& barrier) const {
    const auto wait = [](void* at, int members) { static_cast<TeamBarrier*>(at)->wait(members); };
    const Team all{rank, size, &barrier, wait}, alone{0, 1, nullptr, wait};
    if (weights_size) {
      cpu.prepare(p, weights, all);
      all.wait();
    }
    char* own = owns + rank * own_size;
    if (plan.together) return cpu.forward(p, weights, groups, own, 0, plan.group, all, true);
    const int64_t windows = p.windows(), begin = windows * rank / size, end = windows * (rank + 1) / size;
    for (int64_t first = begin; first < end; first += plan.group)
      cpu.forward(p, weights, groups + rank * group_size, own, first,
                  static_cast<int>(std::min<int64_t>(plan.group, end - first)), alone, first == begin);
  }
};

// A chunk's gradients of the weights are summed in memory of its own. Chunks follow from the problem alone,
// so that sums are taken in the same order whatever the threads.
constexpr int kBackwardTokens = 128;  // of a group: the depth of the products that give weight gradients
int64_t chunk_windows(const Params& p) {
  constexpr int64_t kMaxChunks = 16;
  return std::max<int64_t>((p.windows() + kMaxChunks - 1) / kMaxChunks,
                           (kBackwardTokens + p.tokens() - 1) / p.tokens());
}

struct BackwardCall {
  const Params& p;
  const CpuKernel& cpu;
  int chunks, group;
  char *weights, *partials, *owns;
  size_t weights_size, partial_size, own_size;

  void member(int rank, int size, TeamBarrier& barrier) const {
    const auto wait = [](void* at, int members) { static_cast<TeamBarrier*>(at)->wait(members); };
    const Team all{rank, size, &barrier, wait};
    if (weights_size) {
      cpu.prepare(p, weights, all);
      all.wait();
    }
    const int64_t windows = p.windows(), chunk = chunk_windows(p);
    for (int i = all.begin(chunks); i < all.end(chunks); ++i)
      cpu.backward(p, weights, owns + rank * own_size, partials + i * partial_size, i * chunk,
                   std::min(chunk, windows - i * chunk), group);
    all.wait();
    const int rows = cpu.reduce_rows(p);
    cpu.reduce(p, partials, partial_size, chunks, all.begin(rows), all.end(rows));
  }
};

}  // namespace

void forward_cpu(const Params& p, int threads) {
  const CpuKernel& cpu = kernel();
  const Plan plan(p, products(p), threads);
  Call call{p,
            cpu,
            plan,
            nullptr,
            nullptr,
            nullptr,
            aligned(cpu.weights_size(p)),
            aligned(cpu.forward_group_size(p, plan.group)),
            aligned(cpu.forward_own_size(p, plan.group))};
  const size_t groups = plan.together ? 1 : plan.threads;
  call.weights = static_cast<char*>(
      thread_scratch(call.weights_size + groups * call.group_size + plan.threads * call.own_size));
  call.groups = call.weights + call.weights_size;
  call.owns = call.groups + groups * call.group_size;
  parallel_team(
      plan.threads,
      [](void* context, int rank, int size, TeamBarrier& barrier) {
        static_cast<const Call*>(context)->member(rank, size, barrier);
      },
      &call);
}

void backward_cpu(const Params& p, int threads) {
  const CpuKernel& cpu = kernel();
  const int chunks = static_cast<int>((p.windows() + chunk_windows(p) - 1) / chunk_windows(p));
  const int group =
      static_cast<int>(std::min<int64_t>(std::max(kBackwardTokens / p.tokens(), 1), chunk_windows(p)));
  threads = worthwhile_threads(3 * products(p), INT64_MAX, threads);
  BackwardCall call{p,
                    cpu,
                    chunks,
                    group,
                    nullptr,
                    nullptr,
                    nullptr,
                    aligned(cpu.weights_size(p)),
                    aligned(cpu.backward_partial_size(p)),
                    aligned(cpu.backward_own_size(p, group))};
  call.weights = static_cast<char*>(
      thread_scratch(call.weights_size + chunks * call.partial_size + threads * call.own_size));
  call.partials = call.weights + call.weights_size;
  call.owns = call.partials + chunks * call.partial_size;
  parallel_team(
      threads,
      [](void* context, int rank, int size, TeamBarrier& barrier) {
        static_cast<const BackwardCall*>(context)->member(rank, size, barrier);
      },
      &call);
}

}  // namespace vitkernels::cascaded_group_attention
