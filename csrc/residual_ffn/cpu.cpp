#include <algorithm>
#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::residual_ffn {
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

int rows_of(const Params& p, int stage) {
  return stage == kHidden ? p.hidden : p.channels;
}

// u and the hidden layer of a group stay in the second-level cache while the weights stream by.
constexpr int64_t kGroupBytes = 352 << 10;

Plan make_plan(const Params& p, int threads) {
  const int64_t element = p.dtype == DType::f64 ? 8 : 4;
  const int64_t map = int64_t{p.height} * p.width;
  const int64_t most = std::max<int64_t>(kGroupBytes / (element * (p.channels + p.hidden)), 16);
  Plan plan{1, 1, p.height, p.batch, false};
  if (map > most && p.height > 1) {
    // As many bands for each image as fill the threads evenly.
    int64_t bands = (map + most - 1) / most;
    while (bands < p.height && p.batch * bands % threads != 0 && bands < 4 * threads) ++bands;
    plan.rows = static_cast<int>((p.height + bands - 1) / bands);
    plan.bands = (p.height + plan.rows - 1) / plan.rows;
    plan.groups = p.batch * plan.bands;
  } else {
    const int64_t fit = std::max<int64_t>(most / map, 1);
    int64_t groups = (p.batch + fit - 1) / fit;
    groups = std::min<int64_t>((groups + threads - 1) / threads * threads, p.batch);
    plan.images = (p.batch + groups - 1) / groups;
    plan.groups = (p.batch + plan.images - 1) / plan.images;
  }
  plan.by_rows = plan.groups < threads;
  return plan;
}

struct Loop {
  const Params& params;
  const CpuKernel& kernel;
  const Plan& plan;
  char *group_scratch, *thread_scratch;
  size_t group_bytes, thread_bytes;
  int stage;
  int64_t group;
};

void run_groups(void* context, int64_t begin, int64_t end, int slot) {
  const Loop& l = *static_cast<Loop*>(context);
  for (int64_t group = begin; group < end; ++group)
    for (int stage = 0; stage < kStages; ++stage)
      l.kernel.run(l.params, l.plan, static_cast<Stage>(stage), group, 0, rows_of(l.params, stage),
                   l.group_scratch + slot * l.group_bytes, l.thread_scratch + slot * l.thread_bytes);
}

void run_rows(void* context, int64_t begin, int64_t end, int slot) {
  const Loop& l = *static_cast<Loop*>(context);
  const int rows = rows_of(l.params, l.stage);
  l.kernel.run(l.params, l.plan, static_cast<Stage>(l.stage), l.group, static_cast<int>(begin) * kUnit,
               std::min(static_cast<int>(end) * kUnit, rows), l.group_scratch,
               l.thread_scratch + slot * l.thread_bytes);
}

}  // namespace

void forward_cpu(const Params& p, int threads) {
  const CpuKernel& cpu = kernel();
  const double work = 4.0 * p.batch * p.height * p.width * p.channels * p.hidden;
  threads = worthwhile_threads(work, p.batch * p.height * std::max(p.channels / kUnit, 1), threads);
  const Plan plan = make_plan(p, threads);
  Loop loop{
      p, cpu, plan, nullptr, nullptr, aligned(cpu.group_bytes(p, plan)), aligned(cpu.thread_bytes(p, plan)),
      0, 0};
  const int copies = plan.by_rows ? 1 : threads;
  loop.group_scratch =
      static_cast<char*>(thread_scratch(copies * loop.group_bytes + threads * loop.thread_bytes));
  loop.thread_scratch = loop.group_scratch + copies * loop.group_bytes;
  if (!plan.by_rows) return parallel_for(plan.groups, threads, run_groups, &loop);
  for (loop.group = 0; loop.group < plan.groups; ++loop.group)
    for (loop.stage = 0; loop.stage < kStages; ++loop.stage)
      parallel_for((rows_of(p, loop.stage) + kUnit - 1) / kUnit, threads, run_rows, &loop);
}

}  // namespace vitkernels::residual_ffn
