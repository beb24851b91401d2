#include "vitkernels/bind.h"

#include "token_unmerge.h"

namespace py = pybind11;

namespace vitkernels::token_unmerge {
namespace {

Params make_params(const Argument& tokens, const Indices& rows, const Indices& starts,
                   const Indices& members) {
  Params p;
  p.dtype = tokens.dtype;
  p.batch = tokens.shape[0];
  p.tokens = tokens.shape[1];
  p.merged_tokens = starts.shape[1] - 1;
  p.channels = tokens.shape[2];
  p.rows = rows.view;
  p.starts = starts.view;
  p.members = members.view;
  return p;
}

// The argument lists, once for every processor: run(params, where, stream) does the work, where is a device
// index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, const Argument& x, const Argument& y, const Indices& rows,
               const Indices& starts, const Indices& members) {
    Params p = make_params(x, rows, starts, members);
    p.x = x.view;
    p.y = y.view;
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

template <class Run>
auto backward_with(Run run) {
  return [run](int where, uintptr_t stream, const Argument& grad_y, const Argument& grad_x,
               const Indices& rows, const Indices& starts, const Indices& members) {
    Params p = make_params(grad_x, rows, starts, members);
    p.grad_x = grad_x.view;
    p.grad_y = grad_y.view;
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "token_unmerge_forward", forward_with, forward);
  VITKERNELS_BIND(module, "token_unmerge_backward", backward_with, backward);
}

}  // namespace vitkernels::token_unmerge
