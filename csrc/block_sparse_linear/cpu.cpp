#include <cstddef>
#include <initializer_list>

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

// One call: its memory, and its steps one after the other.
class Call {
 public:
  Call(const Params& params, int threads, bool backward) : p_(params), cpu_(kernel()), backward_(backward) {
    const double product = 2.0 * p_.tokens * p_.nnz * p_.block_height * p_.block_width;
    const double moved = 4.0 * p_.tokens * (p_.in_features + p_.out_features);
    threads_ = worthwhile_threads(product + moved, p_.tokens * p_.given(), threads);
  }

  // Reserves memory for the packed operands that the call wants, and for what each thread needs.
  void reserve(bool inputs, bool outputs, bool weights, std::initializer_list<Step> steps) {
    const size_t sizes[] = {inputs ? aligned(cpu_.shared_bytes(p_, kPackInputs, backward_)) : 0,
                            outputs ? aligned(cpu_.shared_bytes(p_, kPackOutputs, backward_)) : 0,
                            weights ? aligned(cpu_.shared_bytes(p_, kPackWeights, backward_)) : 0};
    for (Step step : steps) {
      const size_t size = aligned(cpu_.thread_bytes(p_, step));
      if (size > thread_size_) thread_size_ = size;
    }
    char* memory =
        static_cast<char*>(thread_scratch(sizes[0] + sizes[1] + sizes[2] + thread_size_ * threads_));
    shared_ = {memory, memory + sizes[0], memory + sizes[0] + sizes[1]};
    thread_memory_ = memory + sizes[0] + sizes[1] + sizes[2];
  }

  void run(Step step) {
    step_ = step;
    items_ = cpu_.items(p_, step, threads_);
    parallel_for(
        items_, threads_,
        [](void* context, int64_t begin, int64_t end, int slot) {
          const Call& c = *static_cast<Call*>(context);
          c.cpu_.run(c.p_, c.step_, c.backward_, begin, end, c.items_, c.shared_,
                     c.thread_memory_ + slot * c.thread_size_);
        },
        this);
  }

 private:
  const Params& p_;
  const CpuKernel& cpu_;
  bool backward_;
  int threads_;
  Shared shared_{};
  char* thread_memory_ = nullptr;
  size_t thread_size_ = 0;
  Step step_ = kPackInputs;
  int64_t items_ = 0;
};

}  // namespace

void forward_cpu(const Params& p, int threads) {
  Call call(p, threads, false);
  const bool packs = !reads_in_place(p);
  call.reserve(packs, false, true, {kForward});
  if (packs) call.run(kPackInputs);
  call.run(kPackWeights);
  call.run(kForward);
}

void backward_cpu(const Params& p, int threads) {
  Call call(p, threads, true);
  call.reserve(bool(p.grad_values), true, bool(p.grad_x), {kBackward, kGradientValues});
  call.run(kPackOutputs);
  if (p.grad_x) {
    call.run(kPackWeights);
    call.run(kBackward);
  }
  if (p.grad_values) {
    call.run(kPackInputs);
    call.run(kGradientValues);
  }
  if (p.grad_bias) call.run(kGradientBias);
}

}  // namespace vitkernels::block_sparse_linear
