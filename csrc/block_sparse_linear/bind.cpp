#include "vitkernels/bind.h"

#include "block_sparse_linear.h"

namespace py = pybind11;

namespace vitkernels::block_sparse_linear {
namespace {

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

Params make_params(const Argument& x, const Argument& values, uintptr_t index, int out_features,
                   int in_features, int activation, bool transposed) {
  Params p;
  p.dtype = x.dtype;
  p.activation = static_cast<Activation>(activation);
  p.transposed = transposed;
  p.tokens = x.shape[0];
  p.out_features = out_features;
  p.in_features = in_features;
  p.block_height = static_cast<int>(values.shape[1]);
  p.block_width = static_cast<int>(values.shape[2]);
  p.block_rows = ceil_div(out_features, p.block_height);
  p.block_cols = ceil_div(in_features, p.block_width);
  p.nnz = values.shape[0];
  p.index = reinterpret_cast<const int32_t*>(index);
  p.x = x.view;
  p.values = values.view;
  return p;
}

// The two argument lists, once for every processor: run(params, where, stream) does the work, where is a
// device index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& y, const Argument& before,
               const Argument& x, const Argument& values, const Argument& bias, uintptr_t index,
               int out_features, int in_features, int activation, bool transposed) {
    Params p = make_params(x, values, index, out_features, in_features, activation, transposed);
    p.y = y.view;
    p.before = before.view;
    p.bias = bias.view;
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

template <class Run>
auto backward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& grad_x,
               const Argument& grad_values, const Argument& grad_bias, const Argument& grad_before,
               const Argument& grad_y, const Argument& kept, const Argument& x, const Argument& values,
               uintptr_t index, int out_features, int in_features, int activation, bool transposed) {
    Params p = make_params(x, values, index, out_features, in_features, activation, transposed);
    p.grad_x = grad_x.view;
    p.grad_values = grad_values.view;
    p.grad_bias = grad_bias.view;
    p.grad_before = grad_before.view;
    p.grad_y = grad_y.view;
    (p.activation == Activation::relu ? p.y : p.before) = kept.view;
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "block_sparse_linear_forward", forward_with, forward);
  VITKERNELS_BIND(module, "block_sparse_linear_backward", backward_with, backward);
#if VITKERNELS_WITH_CUDA
  module.def("block_sparse_linear_forward_workspace_cuda",
             [](const Argument&, const Argument&, const Argument& x, const Argument& values, const Argument&,
                uintptr_t index, int out_features, int in_features, int activation, bool transposed) {
               return forward_workspace_cuda(
                   make_params(x, values, index, out_features, in_features, activation, transposed));
             });
  module.def("block_sparse_linear_backward_workspace_cuda",
             [](const Argument&, const Argument& grad_values, const Argument& grad_bias, const Argument&,
                const Argument&, const Argument&, const Argument& x, const Argument& values, uintptr_t index,
                int out_features, int in_features, int activation, bool transposed) {
               Params p = make_params(x, values, index, out_features, in_features, activation, transposed);
               p.grad_values = grad_values.view;
               p.grad_bias = grad_bias.view;
               return backward_workspace_cuda(p);
             });
#endif
}

}  // namespace vitkernels::block_sparse_linear
