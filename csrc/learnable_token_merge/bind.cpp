#include "vitkernels/bind.h"

#include <string>

#include "learnable_token_merge.h"

namespace py = pybind11;

namespace vitkernels::learnable_token_merge {
namespace {

Normalize normalize_of(const std::string& name) {
  if (name == "sum") return Normalize::sum;
  if (name == "softmax") return Normalize::softmax;
  if (name == "softmax_rows") return Normalize::softmax_rows;
  return Normalize::none;
}

// A tensor whose batch dimension may be missing, which then has a stride of 0.
View spread(const Argument& argument, int ndim) {
  View view = argument.view;
  if (view && argument.ndim < ndim) {
    for (int i = ndim - 1; i > 0; --i) view.stride[i] = view.stride[i - 1];
    view.stride[0] = 0;
  }
  return view;
}

Params make_params(const Argument& z, const Argument& g, const Argument& other, const Argument& y,
                   const Argument& y_other, const Argument& divisors, const std::string& normalize) {
  Params p;
  p.dtype = z.dtype;
  p.mask_dtype = g.dtype;
  p.normalize = normalize_of(normalize);
  p.batch = z.shape[0];
  p.tokens = z.shape[1];
  p.merged_tokens = g.shape[g.ndim - 1];
  p.width = z.shape[2];
  p.other_width = other.view ? other.shape[2] : 0;
  p.z = z.view;
  p.other = other.view;
  p.g = spread(g, 3);
  p.y = y.view;
  p.y_other = y_other.view;
  p.divisors = spread(divisors, 2);
  return p;
}

void set_gradients(Params* p, const Argument& grad_z, const Argument& grad_g, const Argument& grad_other,
                   const Argument& grad_y, const Argument& grad_y_other) {
  p->grad_z = grad_z.view;
  p->grad_g = spread(grad_g, 3);
  p->grad_other = grad_other.view;
  p->grad_y = grad_y.view;
  p->grad_y_other = grad_y_other.view;
}

// The two argument lists, once for every processor: run(params, where, stream) does the work, where
// is a device index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& y, const Argument& y_other,
               const Argument& divisors, const Argument& z, const Argument& g, const Argument& other,
               const std::string& normalize) {
    Params p = make_params(z, g, other, y, y_other, divisors, normalize);
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

template <class Run>
auto backward_with(Run run) {
  return
      [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& grad_z, const Argument& grad_g,
            const Argument& grad_other, const Argument& grad_y, const Argument& grad_y_other,
            const Argument& y, const Argument& y_other, const Argument& divisors, const Argument& z,
            const Argument& g, const Argument& other, const std::string& normalize) {
        Params p = make_params(z, g, other, y, y_other, divisors, normalize);
        set_gradients(&p, grad_z, grad_g, grad_other, grad_y, grad_y_other);
        p.workspace = reinterpret_cast<void*>(workspace);
        py::gil_scoped_release release;
        run(p, where, reinterpret_cast<Stream>(stream));
      };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "learnable_token_merge_forward", forward_with, forward);
  VITKERNELS_BIND(module, "learnable_token_merge_backward", backward_with, backward);
#if VITKERNELS_WITH_CUDA
  module.def("learnable_token_merge_forward_workspace_cuda",
             [](const Argument& z, const Argument& g, const Argument& other, const std::string& normalize) {
               return forward_workspace_cuda(make_params(z, g, other, {}, {}, {}, normalize));
             });
  module.def("learnable_token_merge_workspace_cuda",
             [](const Argument& grad_z, const Argument& grad_g, const Argument& grad_other,
                const Argument& grad_y, const Argument& grad_y_other, const Argument& z, const Argument& g,
                const Argument& other, const std::string& normalize) {
               Params p = make_params(z, g, other, {}, {}, {}, normalize);
               set_gradients(&p, grad_z, grad_g, grad_other, grad_y, grad_y_other);
               return backward_workspace_cuda(p);
             });
#endif
}

}  // namespace vitkernels::learnable_token_merge
