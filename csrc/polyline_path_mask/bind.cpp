#include "vitkernels/bind.h"

#include "polyline_path_mask.h"

namespace py = pybind11;

namespace vitkernels::polyline_path_mask {
namespace {

Params make_params(bool log, bool transpose, const Argument& decay_w, const Argument& decay_h) {
  Params p;
  p.dtype = decay_w.dtype;
  p.batch = decay_w.shape[0];
  p.height = static_cast<int>(decay_w.shape[1]);
  p.width = static_cast<int>(decay_w.shape[2]);
  p.heads = static_cast<int>(decay_w.shape[3]);
  p.log = log;
  p.transpose = transpose;
  p.decay_w = decay_w.view;
  p.decay_h = decay_h.view;
  return p;
}

// The argument lists, once for every processor: run(params, where, stream) does the work, where is a device
// index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& mask,
               const Argument& decay_w, const Argument& decay_h, bool log, bool transpose) {
    Params p = make_params(log, transpose, decay_w, decay_h);
    p.mask = mask.view;
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

template <class Run>
auto backward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& grad_w,
               const Argument& grad_h, const Argument& grad_mask, const Argument& decay_w,
               const Argument& decay_h, bool log, bool transpose) {
    Params p = make_params(log, transpose, decay_w, decay_h);
    p.grad_w = grad_w.view;
    p.grad_h = grad_h.view;
    p.grad_mask = grad_mask.view;
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "polyline_path_mask_forward", forward_with, forward);
  VITKERNELS_BIND(module, "polyline_path_mask_backward", backward_with, backward);
#if VITKERNELS_WITH_CUDA
  module.def("polyline_path_mask_forward_workspace_cuda",
             [](const Argument& decay_w, const Argument& decay_h, bool log, bool transpose) {
               return forward_workspace_cuda(make_params(log, transpose, decay_w, decay_h));
             });
  module.def("polyline_path_mask_backward_workspace_cuda",
             [](const Argument& decay_w, const Argument& decay_h, bool log, bool transpose) {
               return backward_workspace_cuda(make_params(log, transpose, decay_w, decay_h));
             });
#endif
}

}  // namespace vitkernels::polyline_path_mask
