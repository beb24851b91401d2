// Cascaded group attention on the CPU, one instruction set.
//
// Floor of a window of N tokens, forward: 2 N (h (2k + d) d + k sum_i kappa_i^2 + h k N + C N + C^2) FLOPs
// and h N^2 exponentials, at 2 FMAs a cycle; the map crosses memory once each way, the weights once a group
// of windows. The backward pass recomputes q, k, v and the probabilities: h (2k + d) d + k sum_i kappa_i^2 +
// h k N, once more, and takes two products for each of the forward's.
#include "cpu_kernel.h"

#include "backward_cpu.h"

namespace vitkernels::cascaded_group_attention {
namespace VITKERNELS_ISA {
namespace {

size_t weights_size(const Params& p) {
  return p.dtype == DType::f64 ? Weights<double>::size(p) : Weights<float>::size(p);
}
void prepare(const Params& p, void* shared, const Team& all) {
  p.dtype == DType::f64 ? Weights<double>::prepare(p, shared, all) : Weights<float>::prepare(p, shared, all);
}

size_t forward_group_size(const Params& p, int windows) {
  return p.dtype == DType::f64 ? ForwardGroup<double>(p, windows, Scratch(nullptr)).size
                               : ForwardGroup<float>(p, windows, Scratch(nullptr)).size;
}
size_t forward_own_size(const Params& p, int windows) {
  return p.dtype == DType::f64 ? ForwardOwn<double>(p, windows, Scratch(nullptr)).size
                               : ForwardOwn<float>(p, windows, Scratch(nullptr)).size;
}
void forward(const Params& p, const void* shared, void* group, void* own, int64_t first, int count,
             const Team& team, bool fresh) {
  with_dtype(p.dtype, [&](auto element) {
    Forward<decltype(element)>(p, shared, group, own, first, count, team, fresh).run();
  });
}

size_t backward_partial_size(const Params& p) {
  return p.dtype == DType::f64 ? Partial<double>(p, Scratch(nullptr)).size
                               : Partial<float>(p, Scratch(nullptr)).size;
}
size_t backward_own_size(const Params& p, int group) {
  return p.dtype == DType::f64 ? BackwardOwn<double>(p, group, Scratch(nullptr)).size
                               : BackwardOwn<float>(p, group, Scratch(nullptr)).size;
}
void backward(const Params& p, const void* shared, void* own, void* partial, int64_t first, int64_t count,
              int group) {
  with_dtype(p.dtype, [&](auto element) {
    Backward<decltype(element)>(p, shared, own, partial, group).run(first, count, group);
  });
}

int reduce_rows(const Params& p) {
  return p.channels + p.num_heads * (p.qkv_rows() + p.key_dim) + 1;
}
template <class T, class W>
void reduce_weights(const Params& p, char* partials, size_t size, int chunks, int begin, int end) {
  const Reduce<T, W> reduce{p, Partial<T>(p, Scratch(partials)), size / sizeof(T), chunks};
  for (int r = begin; r < end; ++r) reduce.run(r);
}
template <class T, class B>
void reduce_table(const Params& p, char* partials, size_t size, int chunks) {
  const Partial<T> first(p, Scratch(partials));
  for (int h = 0; h < p.num_heads; ++h)
    reduce_row<T, B>(static_cast<B*>(p.grad_attn_bias.data) + h * p.grad_attn_bias.stride[0],
                     p.grad_attn_bias.stride[1], first.table + h * first.entries, size / sizeof(T), chunks,
                     p.tokens());
}
// The weights' and the table's dtypes differ, so the table comes with the last row rather than in a row of
// its own.
template <class T>
void reduce_as(const Params& p, char* partials, size_t size, int chunks, int begin, int end) {
  const auto weights = p.weight_dtype == DType::f64   ? reduce_weights<T, double>
                       : p.weight_dtype == DType::f32 ? reduce_weights<T, float>
                       : p.weight_dtype == DType::f16 ? reduce_weights<T, f16>
                                                      : reduce_weights<T, bf16>;
  weights(p, partials, size, chunks, begin, end);
  if (!p.grad_attn_bias || end < reduce_rows(p)) return;
  const auto table = p.table_dtype == DType::f64   ? reduce_table<T, double>
                     : p.table_dtype == DType::f32 ? reduce_table<T, float>
                     : p.table_dtype == DType::f16 ? reduce_table<T, f16>
                                                   : reduce_table<T, bf16>;
  table(p, partials, size, chunks);
}
void reduce(const Params& p, const char* partials, size_t size, int chunks, int begin, int end) {
  char* memory = const_cast<char*>(partials);
  p.dtype == DType::f64 ? reduce_as<double>(p, memory, size, chunks, begin, end)
                        : reduce_as<float>(p, memory, size, chunks, begin, end);
}

}  // namespace

extern const CpuKernel kKernel;
const CpuKernel kKernel = {
    weights_size,          prepare,           forward_group_size, forward_own_size, forward,
    backward_partial_size, backward_own_size, backward,           reduce_rows,      reduce};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::cascaded_group_attention
