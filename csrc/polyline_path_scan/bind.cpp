#include "vitkernels/bind.h"

#include "polyline_path_scan.h"

namespace py = pybind11;

namespace vitkernels::polyline_path_scan {
namespace {

Params make_params(bool transpose, const Argument& x, const Argument& decay_w, const Argument& decay_h) {
  Params p;
  p.dtype = x.dtype;
  p.decay_dtype = decay_w.dtype;
  p.batch = x.shape[0];
  p.height = static_cast<int>(x.shape[1]);
  p.width = static_cast<int>(x.shape[2]);
  p.heads = static_cast<int>(x.shape[3]);
  p.head_dim = static_cast<int>(x.shape[4]);
  p.transpose = transpose;
  p.x = x.view;
  p.decay_w = decay_w.view;
  p.decay_h = decay_h.view;
  p.wants_x = false;
  return p;
}

// The argument lists, once for every processor: run(params, where, stream) does the work, where is a device
// index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, const Argument& y, const Argument& x, const Argument& decay_w,
               const Argument& decay_h, bool transpose) {
    Params p = make_params(transpose, x, decay_w, decay_h);
    p.y = y.view;
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

template <class Run>
auto backward_with(Run run) {
  return [run](int where, uintptr_t stream, const Argument& buffer, bool wants_x, const Argument& grad_w,
               const Argument& grad_h, const Argument& grad_y, const Argument& x, const Argument& decay_w,
               const Argument& decay_h, bool transpose) {
    Params p = make_params(transpose, x, decay_w, decay_h);
    p.buffer = buffer.view;
    p.wants_x = wants_x;
    p.grad_w = grad_w.view;
    p.grad_h = grad_h.view;
    p.grad_y = grad_y.view;
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "polyline_path_scan_forward", forward_with, forward);
  VITKERNELS_BIND(module, "polyline_path_scan_backward", backward_with, backward);
}

}  // namespace vitkernels::polyline_path_scan
