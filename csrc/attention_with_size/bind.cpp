#include "vitkernels/bind.h"

#include "attention_with_size.h"

namespace py = pybind11;

namespace vitkernels::attention_with_size {
namespace {

Params make_params(const Argument& q, const Argument& k, const Argument& v, const Argument& size,
                   const Argument& out, const Argument& lse, double scale) {
  Params p;
  p.dtype = q.dtype;
  p.batch = q.shape[0];
  p.heads = static_cast<int>(q.shape[1]);
  p.queries = q.shape[2];
  p.keys = k.shape[2];
  p.key_dim = static_cast<int>(q.shape[3]);
  p.value_dim = static_cast<int>(v.shape[3]);
  p.scale = scale;
  p.q = q.view;
  p.k = k.view;
  p.v = v.view;
  p.size = size.view;
  p.out = out.view;
  p.lse = lse.view;
  return p;
}

void set_gradients(Params* p, const Argument& grad_q, const Argument& grad_k, const Argument& grad_v) {
  p->grad_q = grad_q.view;
  p->grad_k = grad_k.view;
  p->grad_v = grad_v.view;
}

// The two argument lists, once for every processor: run(params, where, stream) does the work, where
// is a device index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, const Argument& out, const Argument& lse, const Argument& q,
               const Argument& k, const Argument& v, const Argument& size, double scale) {
    const Params p = make_params(q, k, v, size, out, lse, scale);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

template <class Run>
auto backward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& grad_q,
               const Argument& grad_k, const Argument& grad_v, const Argument& grad_out,
               const Argument& grad_lse, const Argument& out, const Argument& lse, const Argument& q,
               const Argument& k, const Argument& v, const Argument& size, double scale) {
    Params p = make_params(q, k, v, size, out, lse, scale);
    set_gradients(&p, grad_q, grad_k, grad_v);
    p.grad_out = grad_out.view;
    p.grad_lse = grad_lse.view;
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "attention_with_size_forward", forward_with, forward);
  VITKERNELS_BIND(module, "attention_with_size_backward", backward_with, backward);
#if VITKERNELS_WITH_CUDA
  module.def("attention_with_size_workspace_cuda",
             [](const Argument& grad_q, const Argument& grad_k, const Argument& grad_v, const Argument& q,
                const Argument& k, const Argument& v, const Argument& size, double scale) {
               Params p = make_params(q, k, v, size, {}, {}, scale);
               set_gradients(&p, grad_q, grad_k, grad_v);
               return backward_workspace_cuda(p);
             });
#endif
}

}  // namespace vitkernels::attention_with_size
