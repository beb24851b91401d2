#include "vitkernels/bind.h"

#include "polyline_path_attention.h"

namespace py = pybind11;

namespace vitkernels::polyline_path_attention {
namespace {

Params make_params(bool criss_cross, double scale, const Argument& q, const Argument& k, const Argument& v,
                   const Argument& log_decay_w, const Argument& log_decay_h, const Argument& out,
                   const Argument& lse, const Argument& cum, const Argument& partial) {
  Params p;
  p.dtype = q.dtype;
  p.decay_dtype = log_decay_w.dtype;
  p.batch = q.shape[0];
  p.height = static_cast<int>(q.shape[1]);
  p.width = static_cast<int>(q.shape[2]);
  p.heads = static_cast<int>(q.shape[3]);
  p.head_dim = static_cast<int>(q.shape[4]);
  p.value_dim = static_cast<int>(v.shape[4]);
  p.criss_cross = criss_cross;
  p.scale = scale;
  p.q = q.view;
  p.k = k.view;
  p.v = v.view;
  p.log_decay_w = log_decay_w.view;
  p.log_decay_h = log_decay_h.view;
  p.out = out.view;
  p.lse = lse.view;
  p.cum = cum.view;
  p.partial = partial.view;
  return p;
}

// The two argument lists, once for every processor: run(params, where, stream) does the work, where
// is a device index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, const Argument& out, const Argument& lse, const Argument& cum,
               const Argument& partial, const Argument& q, const Argument& k, const Argument& v,
               const Argument& log_decay_w, const Argument& log_decay_h, bool criss_cross, double scale) {
    const Params p =
        make_params(criss_cross, scale, q, k, v, log_decay_w, log_decay_h, out, lse, cum, partial);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

struct Backward {
  Argument grad_q, grad_k, grad_v, grad_w, grad_h, grad_out, out, lse, cum, partial, q, k, v, log_decay_w,
      log_decay_h;

  Params params(bool criss_cross, double scale) const {
    Params p = make_params(criss_cross, scale, q, k, v, log_decay_w, log_decay_h, out, lse, cum, partial);
    p.grad_out = grad_out.view;
    p.grad_q = grad_q.view;
    p.grad_k = grad_k.view;
    p.grad_v = grad_v.view;
    p.grad_log_decay_w = grad_w.view;
    p.grad_log_decay_h = grad_h.view;
    return p;
  }
};

template <class Run>
auto backward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& grad_q,
               const Argument& grad_k, const Argument& grad_v, const Argument& grad_w, const Argument& grad_h,
               const Argument& grad_out, const Argument& out, const Argument& lse, const Argument& cum,
               const Argument& partial, const Argument& q, const Argument& k, const Argument& v,
               const Argument& log_decay_w, const Argument& log_decay_h, bool criss_cross, double scale) {
    Params p = Backward{grad_q, grad_k,  grad_v, grad_w, grad_h, grad_out,    out,        lse,
                        cum,    partial, q,      k,      v,      log_decay_w, log_decay_h}
                   .params(criss_cross, scale);
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "polyline_path_attention_forward", forward_with, forward);
  VITKERNELS_BIND(module, "polyline_path_attention_backward", backward_with, backward);
#if VITKERNELS_WITH_CUDA
  module.def("polyline_path_attention_workspace_cuda",
             [](const Argument& grad_q, const Argument& grad_k, const Argument& grad_v,
                const Argument& grad_w, const Argument& grad_h, const Argument& grad_out, const Argument& out,
                const Argument& lse, const Argument& cum, const Argument& partial, const Argument& q,
                const Argument& k, const Argument& v, const Argument& log_decay_w,
                const Argument& log_decay_h, bool criss_cross, double scale) {
               return backward_workspace_cuda(Backward{grad_q, grad_k, grad_v, grad_w, grad_h, grad_out, out,
                                                       lse, cum, partial, q, k, v, log_decay_w, log_decay_h}
                                                  .params(criss_cross, scale));
             });
#endif
}

}  // namespace vitkernels::polyline_path_attention
