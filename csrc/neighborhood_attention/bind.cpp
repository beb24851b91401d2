#include "vitkernels/bind.h"

#include "neighborhood_attention.h"

namespace py = pybind11;

namespace vitkernels::neighborhood_attention {
namespace {

struct Options {
  int kernel_h, kernel_w, dilation_h, dilation_w;
  bool causal_h, causal_w;
  double scale;
};

// Axes (batch, x, ...) of a sequence as (batch, y, x, ...) of a map of height 1.
View on_map(const Argument& tensor, bool sequence) {
  View view = tensor.view;
  if (!sequence) return view;
  for (int i = 4; i > 1; --i) view.stride[i] = view.stride[i - 1];
  view.stride[1] = 0;
  return view;
}

View bias_on_map(const Argument& rpb, bool sequence) {
  View view = rpb.view;
  if (!sequence) return view;
  view.stride[2] = view.stride[1];
  view.stride[1] = 0;
  return view;
}

Params make_params(const Options& options, const Argument& q, const Argument& k, const Argument& v,
                   const Argument& rpb, const Argument& out, const Argument& lse) {
  const bool sequence = q.ndim == 4;
  const int64_t* tail = q.shape + (sequence ? 1 : 2);  // width, heads, d
  Params p;
  p.dtype = q.dtype;
  p.rpb_dtype = rpb.view ? rpb.dtype : q.dtype;
  p.batch = q.shape[0];
  p.height = sequence ? 1 : static_cast<int>(q.shape[1]);
  p.width = static_cast<int>(tail[0]);
  p.heads = static_cast<int>(tail[1]);
  p.head_dim = static_cast<int>(tail[2]);
  p.value_dim = static_cast<int>(v.shape[v.ndim - 1]);
  p.kernel_h = options.kernel_h;
  p.kernel_w = options.kernel_w;
  p.dilation_h = options.dilation_h;
  p.dilation_w = options.dilation_w;
  p.causal_h = options.causal_h;
  p.causal_w = options.causal_w;
  p.scale = options.scale;
  p.q = on_map(q, sequence);
  p.k = on_map(k, sequence);
  p.v = on_map(v, sequence);
  p.rpb = bias_on_map(rpb, sequence);
  p.out = on_map(out, sequence);
  p.lse = on_map(lse, sequence);
  return p;
}

// The two argument lists, once for every processor: run(params, where, stream) does the work, where
// is a device index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, const Argument& out, const Argument& lse, const Argument& q,
               const Argument& k, const Argument& v, const Argument& rpb, int kernel_h, int kernel_w,
               int dilation_h, int dilation_w, bool causal_h, bool causal_w, double scale) {
    const Options options{kernel_h, kernel_w, dilation_h, dilation_w, causal_h, causal_w, scale};
    const Params p = make_params(options, q, k, v, rpb, out, lse);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

void set_gradients(Params* p, const Argument& q, const Argument& grad_q, const Argument& grad_k,
                   const Argument& grad_v, const Argument& grad_rpb) {
  const bool sequence = q.ndim == 4;
  p->grad_q = on_map(grad_q, sequence);
  p->grad_k = on_map(grad_k, sequence);
  p->grad_v = on_map(grad_v, sequence);
  p->grad_rpb = bias_on_map(grad_rpb, sequence);
}

template <class Run>
auto backward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& grad_q,
               const Argument& grad_k, const Argument& grad_v, const Argument& grad_rpb,
               const Argument& grad_out, const Argument& grad_lse, const Argument& out, const Argument& lse,
               const Argument& q, const Argument& k, const Argument& v, const Argument& rpb, int kernel_h,
               int kernel_w, int dilation_h, int dilation_w, bool causal_h, bool causal_w, double scale) {
    const Options options{kernel_h, kernel_w, dilation_h, dilation_w, causal_h, causal_w, scale};
    Params p = make_params(options, q, k, v, rpb, out, lse);
    set_gradients(&p, q, grad_q, grad_k, grad_v, grad_rpb);
    p.grad_out = on_map(grad_out, q.ndim == 4);
    p.grad_lse = on_map(grad_lse, q.ndim == 4);
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "neighborhood_attention_forward", forward_with, forward);
  VITKERNELS_BIND(module, "neighborhood_attention_backward", backward_with, backward);
#if VITKERNELS_WITH_CUDA
  module.def(
      "neighborhood_attention_workspace_cuda",
      [](const Argument& grad_q, const Argument& grad_k, const Argument& grad_v, const Argument& grad_rpb,
         const Argument& q, const Argument& k, const Argument& v, const Argument& rpb, int kernel_h,
         int kernel_w, int dilation_h, int dilation_w, bool causal_h, bool causal_w, double scale) {
        const Options options{kernel_h, kernel_w, dilation_h, dilation_w, causal_h, causal_w, scale};
        Params p = make_params(options, q, k, v, rpb, {}, {});
        set_gradients(&p, q, grad_q, grad_k, grad_v, grad_rpb);
        return backward_workspace_cuda(p);
      });
#endif
}

}  // namespace vitkernels::neighborhood_attention
