#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::polyline_path_mask {
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

double mask_bytes(const Params& p) {
  const double size = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
  return size * p.planes() * p.tokens() * p.tokens();
}

// A mask beyond this does not stay in the caches for its reader, so that it need not pass through them.
constexpr double kStreamBytes = 4 << 20;

struct Loop {
  const Params& params;
  const CpuKernel& kernel;
  bool stream;
  char* scratch;
  size_t scratch_size;
  void* partials;
};

}  // namespace

void forward_cpu(const Params& p, int threads) {
  const CpuKernel& cpu = kernel();
  const int64_t items = p.planes() * p.height;
  threads = worthwhile_threads(mask_bytes(p), items, threads);
  const size_t size = aligned(cpu.forward_scratch(p));
  Loop loop{p,    cpu,    mask_bytes(p) > kStreamBytes, static_cast<char*>(thread_scratch(size * threads)),
            size, nullptr};
  parallel_for(
      items, threads,
      [](void* context, int64_t begin, int64_t end, int slot) {
        const Loop& l = *static_cast<Loop*>(context);
        l.kernel.forward(l.params, l.stream, begin, end, l.scratch + slot * l.scratch_size);
      },
      &loop);
}

void backward_cpu(const Params& p, int threads) {
  const CpuKernel& cpu = kernel();
  const int64_t items = p.planes() * p.owners();
  threads = worthwhile_threads(mask_bytes(p), items, threads);
  const size_t shared = aligned(cpu.partials_size(p)), size = aligned(cpu.backward_scratch(p));
  char* memory = static_cast<char*>(thread_scratch(shared + size * threads));
  Loop loop{p, cpu, false, memory + shared, size, memory};
  parallel_for(
      items, threads,
      [](void* context, int64_t begin, int64_t end, int slot) {
        const Loop& l = *static_cast<Loop*>(context);
        l.kernel.backward(l.params, begin, end, l.scratch + slot * l.scratch_size, l.partials);
      },
      &loop);
  if (shared != 0)
    parallel_for(
        p.planes(), threads,
        [](void* context, int64_t begin, int64_t end, int) {
          const Loop& l = *static_cast<Loop*>(context);
          l.kernel.reduce_partials(l.params, begin, end, l.partials);
        },
        &loop);
}

}  // namespace vitkernels::polyline_path_mask
