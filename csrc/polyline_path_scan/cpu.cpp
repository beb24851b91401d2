#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::polyline_path_scan {
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

// A product along one axis, with or without the gradient of its decays.
struct Pass {
  Axis axis;
  const View *from, *values, *to;  // without values, the product alone
};

struct Loop {
  const Params& params;
  const CpuKernel& kernel;
  const Pass* passes;
  int count;
  char* scratch;
  size_t scratch_size;
};

void run_lines(const Loop& l, const Pass& pass, int64_t begin, int64_t end, int slot) {
  void* scratch = l.scratch + slot * l.scratch_size;
  if (pass.values)
    l.kernel.gradient(l.params, pass.axis, *pass.from, *pass.values, *pass.to, begin, end, scratch);
  else
    l.kernel.product(l.params, pass.axis, *pass.from, *pass.to, begin, end, scratch);
}

// All passes over an image and head while it is in the caches, where there are enough of them for the
// threads; else one pass after the other, the lines shared out.
void run(const Params& p, const Pass* passes, int count, int threads) {
  const CpuKernel& cpu = kernel();
  const double elements = static_cast<double>(p.planes()) * p.height * p.width * p.head_dim;
  threads = worthwhile_threads(4.0 * count * elements, INT64_MAX, threads);
  const size_t size = aligned(cpu.scratch(p));
  Loop loop{p, cpu, passes, count, static_cast<char*>(thread_scratch(size * threads)), size};
  if (p.planes() % threads == 0 || p.planes() >= 4 * threads)
    return parallel_for(
        p.planes(), threads,
        [](void* context, int64_t begin, int64_t end, int slot) {
          const Loop& l = *static_cast<Loop*>(context);
          for (int64_t plane = begin; plane < end; ++plane)
            for (int i = 0; i < l.count; ++i) {
              const int lines = l.params.lines(l.passes[i].axis);
              run_lines(l, l.passes[i], plane * lines, (plane + 1) * lines, slot);
            }
        },
        &loop);
  for (; loop.count > 0; --loop.count, ++loop.passes)
    parallel_for(
        p.planes() * p.lines(loop.passes->axis), threads,
        [](void* context, int64_t begin, int64_t end, int slot) {
          const Loop& l = *static_cast<Loop*>(context);
          run_lines(l, *l.passes, begin, end, slot);
        },
        &loop);
}

}  // namespace

void forward_cpu(const Params& p, int threads) {
  const Pass passes[] = {{p.axis(0), &p.x, nullptr, &p.y}, {p.axis(1), &p.y, nullptr, &p.y}};
  run(p, passes, 2, threads);
}

void backward_cpu(const Params& p, int threads) {
  const Axis first = p.axis(0), second = p.axis(1);
  const bool wants_first = static_cast<bool>(p.grad_decay(first));
  Pass passes[3];
  int count = 0;
  if (p.grad_decay(second)) {
    // What the second product was given, in the place that its gradient then takes.
    passes[count++] = {first, &p.x, nullptr, &p.buffer};
    passes[count++] = {second, &p.grad_y, &p.buffer, &p.buffer};
  } else {
    passes[count++] = {second, &p.grad_y, nullptr, &p.buffer};
  }
  if (wants_first || p.wants_x) passes[count++] = {first, &p.buffer, wants_first ? &p.x : nullptr, &p.buffer};
  run(p, passes, count, threads);
}

}  // namespace vitkernels::polyline_path_scan
