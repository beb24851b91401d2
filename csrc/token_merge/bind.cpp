#include "vitkernels/bind.h"

#include "token_merge.h"

namespace py = pybind11;

namespace vitkernels::token_merge {
namespace {

Params make_params(const Argument& y, const Argument& sizes, const Argument& x, const Argument& size,
                   const Indices& rows, const Indices& starts, const Indices& members, int mode) {
  Params p;
  p.dtype = x.dtype;
  p.mode = static_cast<Mode>(mode);
  p.batch = x.shape[0];
  p.tokens = x.shape[1];
  p.merged_tokens = starts.shape[1] - 1;
  p.channels = x.shape[2];
  p.x = x.view;
  p.size = size.view;
  p.rows = rows.view;
  p.starts = starts.view;
  p.members = members.view;
  p.y = y.view;
  p.sizes = sizes.view;
  return p;
}

// The argument lists, once for every processor: run(params, where, stream) does the work, where is a device
// index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, const Argument& y, const Argument& sizes, const Argument& x,
               const Argument& size, const Indices& rows, const Indices& starts, const Indices& members,
               int mode) {
    const Params p = make_params(y, sizes, x, size, rows, starts, members, mode);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

template <class Run>
auto backward_with(Run run) {
  return [run](int where, uintptr_t stream, const Argument& grad_x, const Argument& grad_y, const Argument& y,
               const Argument& sizes, const Argument& x, const Argument& size, const Indices& rows,
               const Indices& starts, const Indices& members, int mode) {
    Params p = make_params(y, sizes, x, size, rows, starts, members, mode);
    p.grad_x = grad_x.view;
    p.grad_y = grad_y.view;
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "token_merge_forward", forward_with, forward);
  VITKERNELS_BIND(module, "token_merge_backward", backward_with, backward);
}

}  // namespace vitkernels::token_merge
