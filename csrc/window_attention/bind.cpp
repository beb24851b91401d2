#include "vitkernels/bind.h"

#include "window_attention.h"

namespace py = pybind11;

namespace vitkernels::window_attention {
namespace {

Params make_params(int window_h, int window_w, bool signed_bias, double scale, const Argument& q,
                   const Argument& k, const Argument& v, const Argument& bias_table, const Argument& out,
                   const Argument& lse) {
  Params p;
  p.dtype = q.dtype;
  p.bias_dtype = bias_table.view ? bias_table.dtype : q.dtype;
  p.batch = q.shape[0];
  p.heads = q.shape[1];
  p.window_h = window_h;
  p.window_w = window_w;
  p.head_dim = static_cast<int>(q.shape[3]);
  p.value_dim = static_cast<int>(v.shape[3]);
  p.signed_bias = signed_bias;
  p.scale = scale;
  p.q = q.view;
  p.k = k.view;
  p.v = v.view;
  p.bias_table = bias_table.view;
  p.out = out.view;
  p.lse = lse.view;
  return p;
}

// The two argument lists, once for every processor: run(params, where, stream) does the work, where
// is a device index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, const Argument& out, const Argument& lse, const Argument& q,
               const Argument& k, const Argument& v, const Argument& bias_table, int window_h, int window_w,
               bool signed_bias, double scale) {
    const Params p = make_params(window_h, window_w, signed_bias, scale, q, k, v, bias_table, out, lse);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

template <class Run>
auto backward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& grad_q,
               const Argument& grad_k, const Argument& grad_v, const Argument& grad_bias_table,
               const Argument& grad_out, const Argument& grad_lse, const Argument& out, const Argument& lse,
               const Argument& q, const Argument& k, const Argument& v, const Argument& bias_table,
               int window_h, int window_w, bool signed_bias, double scale) {
    Params p = make_params(window_h, window_w, signed_bias, scale, q, k, v, bias_table, out, lse);
    p.grad_out = grad_out.view;
    p.grad_lse = grad_lse.view;
    p.grad_q = grad_q.view;
    p.grad_k = grad_k.view;
    p.grad_v = grad_v.view;
    p.grad_bias_table = grad_bias_table.view;
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "window_attention_forward", forward_with, forward);
  VITKERNELS_BIND(module, "window_attention_backward", backward_with, backward);
#if VITKERNELS_WITH_CUDA
  module.def("window_attention_workspace_cuda",
             [](const Argument& grad_bias_table, const Argument& q, const Argument& k, const Argument& v,
                const Argument& bias_table, int window_h, int window_w, bool signed_bias, double scale) {
               Params p = make_params(window_h, window_w, signed_bias, scale, q, k, v, bias_table, {}, {});
               p.grad_bias_table = grad_bias_table.view;
               return backward_workspace_cuda(p);
             });
#endif
}

}  // namespace vitkernels::window_attention
