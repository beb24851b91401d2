#include <algorithm>
#include <cstddef>

#include "cpu_kernel.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"

namespace vitkernels::polyline_path_attention {
namespace {

struct Kernels {
  const Loop *sums, *whole_forward, *whole_backward, *criss_cross_forward, *criss_cross_backward,
      *heads_forward, *heads_backward;
};

Kernels kernels() {
#define VITKERNELS_POLYLINE_KERNELS(isa)                                                        \
  {                                                                                             \
    &isa::kSums, &isa::kWholeForward, &isa::kWholeBackward, isa::kCrissCrossForward,            \
        isa::kCrissCrossBackward, &isa::kCrissCrossForwardHeads, &isa::kCrissCrossBackwardHeads \
  }
#ifdef VITKERNELS_X86_ISAS
  if (selected_isa() == Isa::avx512) return VITKERNELS_POLYLINE_KERNELS(avx512);
  if (selected_isa() == Isa::avx2) return VITKERNELS_POLYLINE_KERNELS(avx2);
#endif
  return VITKERNELS_POLYLINE_KERNELS(baseline);
#undef VITKERNELS_POLYLINE_KERNELS
}

constexpr size_t kHeadBytes = 4 << 20;

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
  parallel_for(
      items, worthwhile_threads(work, items, threads),
      [](void* pointer, int64_t begin, int64_t end, int slot) {
        const Context& c = *static_cast<Context*>(pointer);
        c.loop.run(c.params, begin, end, c.memory + slot * c.scratch);
      },
      &context);
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

// Maps that a criss-cross pass takes through its sweeps together: what they read and write stays in a shared
// cache.
int64_t chunk_maps(const Params& p) {
  const int64_t channels = static_cast<int64_t>(p.heads) * (p.head_dim + p.value_dim);
  const int64_t map = static_cast<int64_t>(p.height) * p.width * channels * 3 * accumulate_size(p.dtype);
  return std::clamp<int64_t>((6 << 20) / std::max<int64_t>(map, 1), 1, p.batch);
}

// Whether every thread has heads to take through the sweeps, each in no more memory than its share of the
// caches.
bool by_heads(const Params& p, int threads, size_t scratch) {
  return p.criss_cross && p.batch * p.heads >= threads && scratch <= kHeadBytes;
}

// A tensor [pair][batch][...] of `each` elements a map.
View pair_of_maps(void* data, int64_t maps, int64_t each) {
  View view;
  view.data = data;
  view.stride[0] = maps * each;
  view.stride[1] = each;
  return view;
}

size_t largest_scratch(const Loop* loops, int count, const Params& p) {
  size_t largest = 0;
  for (int i = 0; i < count; ++i) largest = std::max(largest, aligned(loops[i].scratch(p)));
  return largest;
}

}  // namespace

void forward_cpu(const Params& given, int threads) {
  Params p = given;
  const Kernels cpu = kernels();
  const Loop* loops = p.criss_cross ? cpu.criss_cross_forward : cpu.whole_forward;
  const int sweeps = p.criss_cross ? kSweeps : 1;
  const int64_t tokens = static_cast<int64_t>(p.height) * p.width,
                chunk = p.criss_cross ? chunk_maps(p) : p.batch;
  const int64_t values = tokens * p.heads * p.value_dim;
  const size_t sums = p.cum ? 0 : aligned(2 * p.batch * p.heads * tokens * accumulate_size(p.dtype));
  const size_t head = p.criss_cross ? aligned(cpu.heads_forward->scratch(p)) : 0;
  const bool heads = by_heads(p, threads, head);
  const size_t between =
      p.criss_cross && !p.partial && !heads ? aligned(2 * chunk * values * element_size(p.dtype)) : 0;
  const size_t scratch = heads ? head : largest_scratch(loops, sweeps, p);
  char* memory = static_cast<char*>(thread_scratch(sums + between + scratch * threads));
  if (!p.cum) {
    p.cum = pair_of_maps(memory, p.batch, p.heads * tokens);
    p.cum.stride[2] = tokens;
  }
  run(*cpu.sums, p, threads, 10.0 * p.batch * p.heads * tokens, nullptr, 0);
  if (heads) return run(*cpu.heads_forward, p, threads, products(p), memory + sums, scratch);
  for (int64_t first = 0; first < p.batch; first += chunk) {
    Params part = chunk_of(p, first, std::min(chunk, p.batch - first));
    if (between) part.partial = pair_of_maps(memory + sums, chunk, values);
    for (int i = 0; i < sweeps; ++i)
      run(loops[i], part, threads, products(part) / sweeps, memory + sums + between, scratch);
  }
}

void backward_cpu(const Params& p, int threads) {
  const Kernels cpu = kernels();
  const Loop* loops = p.criss_cross ? cpu.criss_cross_backward : cpu.whole_backward;
  if (p.criss_cross) {
    const size_t head = aligned(cpu.heads_backward->scratch(p));
    if (by_heads(p, threads, head)) {
      char* memory = static_cast<char*>(thread_scratch(head * threads));
      return run(*cpu.heads_backward, p, threads, 2.5 * products(p), memory, head);
    }
  }
  const int sweeps = p.criss_cross ? kSweeps : 1;
  const int64_t chunk = p.criss_cross ? chunk_maps(p) : p.batch;
  const int64_t lanes = 64 / accumulate_size(p.dtype);  // of the widest vector
  const int64_t channels = 2 * ((p.head_dim + lanes - 1) / lanes) + 3 * ((p.value_dim + lanes - 1) / lanes);
  const size_t between = p.criss_cross ? aligned(chunk * p.heads * p.height * p.width * channels * 64) : 0;
  const size_t scratch = largest_scratch(loops, sweeps, p);
  char* memory = static_cast<char*>(thread_scratch(between + scratch * threads));
  for (int64_t first = 0; first < p.batch; first += chunk) {
    Params part = chunk_of(p, first, std::min(chunk, p.batch - first));
    part.workspace = memory;
    for (int i = 0; i < sweeps; ++i)
      run(loops[i], part, threads, 2.5 * products(part) / sweeps, memory + between, scratch);
  }
}

}  // namespace vitkernels::polyline_path_attention
