#include <algorithm>
#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::polyline_path_attention {
namespace {

struct Kernels {
  const Loop *sums, *whole_forward, *whole_backward, *small_forward, *small_backward, *criss_cross_forward,
      *criss_cross_backward, *heads_forward, *heads_backward;
};

Kernels kernels() {
#define VITKERNELS_POLYLINE_KERNELS(isa)                                                               \
  {                                                                                                    \
    &isa::kSums, &isa::kWholeForward, &isa::kWholeBackward, &isa::kSmallForward, &isa::kSmallBackward, \
        isa::kCrissCrossForward, isa::kCrissCrossBackward, &isa::kCrissCrossForwardHeads,              \
        &isa::kCrissCrossBackwardHeads                                                                 \
  }
#ifdef VITKERNELS_X86_ISAS
  if (selected_isa() == Isa::avx512) return VITKERNELS_POLYLINE_KERNELS(avx512);
  if (selected_isa() == Isa::avx2) return VITKERNELS_POLYLINE_KERNELS(avx2);
#endif
  return VITKERNELS_POLYLINE_KERNELS(baseline);
#undef VITKERNELS_POLYLINE_KERNELS
}

constexpr size_t kHeadBytes = 4 << 20, kMapBytes = 24 << 20;

size_t aligned(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}
int64_t element_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
int64_t accumulate_size(DType dtype) {
  return dtype == DType::f64 ? 8 : 4;
}

// FLOPs of the products, an exponential counted as twenty.
double products(const Params& p) {
  const double keys = p.criss_cross ? p.height + p.width : static_cast<double>(p.height) * p.width;
  const double each = 2.0 * (p.head_dim + p.value_dim * (p.criss_cross ? 2 : 1)) + 20;
  return p.batch * static_cast<double>(p.height) * p.width * p.heads * keys * each;
}

void run(const Loop& loop, const Params& p, int threads, double work, char* memory, size_t scratch) {
  struct Context {
    const Loop& loop;
    const Params& params;
    char* memory;
    size_t scratch;
  } context{loop, p, memory, scratch};
  const int64_t items = loop.items(p);
  const int used = worthwhile_threads(work, items, threads);
  parallel_for(
      items, used,
      [](void* pointer, int64_t begin, int64_t end, int slot) {
        const Context& c = *static_cast<Context*>(pointer);
        c.loop.run(c.params, begin, end, c.memory + slot * c.scratch);
      },
      &context, worthwhile_chunk(work, items, used));
}

// The maps from `first` on of a tensor whose stride along the batch is stride[axis].
void advance(View* view, int axis, int64_t first, int64_t size) {
  if (*view) view->data = static_cast<char*>(view->data) + first * view->stride[axis] * size;
}
Params chunk_of(const Params& p, int64_t first, int64_t count) {
  Params part = p;
  part.batch = count;
  const int64_t size = element_size(p.dtype), decay = element_size(p.decay_dtype),
                sum = accumulate_size(p.dtype);
  for (View* view :
       {&part.q, &part.k, &part.v, &part.out, &part.grad_out, &part.grad_q, &part.grad_k, &part.grad_v})
    advance(view, 0, first, size);
  for (View* view : {&part.log_decay_w, &part.log_decay_h, &part.grad_log_decay_w, &part.grad_log_decay_h})
    advance(view, 0, first, decay);
  advance(&part.lse, 1, first, sum);
  advance(&part.cum, 1, first, sum);
  advance(&part.partial, 1, first, size);
  return part;
}

// A criss-cross pass: by heads where every thread has some and each fits into its share of the caches,
// otherwise by the lines of as many maps as share a cache.
struct CrissCross {
  const Loop* sweeps;
  const Loop& heads;
  size_t line, head;
  bool by_heads;  // which sum a head's decays first, too
  int64_t chunk;

  CrissCross(const Params& p, const Loop* sweeps, const Loop& heads, int threads)
      : sweeps(sweeps), heads(heads), line(aligned(sweeps[0].scratch(p))), head(heads.scratch(p) - line) {
    by_heads = p.batch * p.heads >= threads && head <= kHeadBytes;
    const int64_t map = p.heads * static_cast<int64_t>(head);
    chunk = std::clamp<int64_t>(kMapBytes / std::max<int64_t>(map, 1), 1, std::max<int64_t>(p.batch, 1));
  }
  size_t bytes(const Params& p, int threads) const {
    return by_heads ? (head + line) * threads : head * p.heads * chunk + line * threads;
  }
  void run_all(const Params& p, int threads, double work, char* memory) const {
    if (by_heads) return run(heads, p, threads, work, memory, head + line);
    char* scratch = memory + head * p.heads * chunk;
    for (int64_t first = 0; first < p.batch; first += chunk) {
      Params part = chunk_of(p, first, std::min(chunk, p.batch - first));
      part.workspace = memory;
      for (int i = 0; i < kSweeps; ++i)
        run(sweeps[i], part, threads, work / kSweeps * part.batch / p.batch, scratch, line);
    }
  }
};

// A tensor [pair][batch][...] of `each` elements a map.
View pair_of_maps(void* data, int64_t maps, int64_t each) {
  View view;
  view.data = data;
  view.stride[0] = maps * each;
  view.stride[1] = each;
  return view;
}

}  // namespace

void forward_cpu(const Params& given, int threads) {
  Params p = given;
  const Kernels cpu = kernels();
  const CrissCross lines(p, cpu.criss_cross_forward, *cpu.heads_forward, threads);
  const int64_t tokens = static_cast<int64_t>(p.height) * p.width;
  const size_t sums = p.cum ? 0 : aligned(2 * p.batch * p.heads * tokens * accumulate_size(p.dtype));
  const Loop& loop = tokens <= kSmallMap ? *cpu.small_forward : *cpu.whole_forward;
  const size_t whole = aligned(loop.scratch(p));
  const size_t scratch = p.criss_cross ? lines.bytes(p, threads) : whole * threads;
  char* memory = static_cast<char*>(thread_scratch(sums + scratch));
  if (!p.cum) {
    p.cum = pair_of_maps(memory, p.batch, p.heads * tokens);
    p.cum.stride[2] = tokens;
  }
  const bool sums_itself = tokens <= kSmallMap && loop.items(p) == p.batch * p.heads;
  if (p.criss_cross ? !lines.by_heads : !sums_itself)
    run(*cpu.sums, p, threads, 10.0 * p.batch * p.heads * tokens, nullptr, 0);
  if (p.criss_cross) return lines.run_all(p, threads, products(p), memory + sums);
  run(loop, p, threads, products(p), memory + sums, whole);
}

void backward_cpu(const Params& p, int threads) {
  const Kernels cpu = kernels();
  if (p.criss_cross) {
    const CrissCross lines(p, cpu.criss_cross_backward, *cpu.heads_backward, threads);
    char* memory = static_cast<char*>(thread_scratch(lines.bytes(p, threads)));
    return lines.run_all(p, threads, 2.5 * products(p), memory);
  }
  const bool small = static_cast<int64_t>(p.height) * p.width <= kSmallMap;
  const Loop& loop = small ? *cpu.small_backward : *cpu.whole_backward;
  const size_t scratch = aligned(loop.scratch(p));
  char* memory = static_cast<char*>(thread_scratch(scratch * threads));
  run(loop, p, threads, 2.5 * products(p), memory, scratch);
}

}  // namespace vitkernels::polyline_path_attention
