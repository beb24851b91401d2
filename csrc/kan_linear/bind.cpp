#include "vitkernels/bind.h"

#include "kan_linear.h"

namespace py = pybind11;

namespace vitkernels::kan_linear {
namespace {

Params make_params(double inv_denominator, double eps, const Argument& x, const Argument& weight,
                   const Argument& ln_weight, const Argument& ln_bias, const Argument& grid,
                   const Argument& y, const Argument& mean, const Argument& rstd) {
  Params p;
  p.x_dtype = x.dtype;
  p.weight_dtype = weight.dtype;
  p.ln_weight_dtype = ln_weight.dtype;
  p.ln_bias_dtype = ln_bias.dtype;
  p.grid_dtype = grid.dtype;
  p.rows = x.shape[0];
  p.channels = static_cast<int>(x.shape[1]);
  p.grids = static_cast<int>(grid.shape[0]);
  p.outputs = static_cast<int>(weight.shape[0]);
  p.inv_denominator = inv_denominator;
  p.eps = eps;
  p.x = x.view;
  p.weight = weight.view;
  p.ln_weight = ln_weight.view;
  p.ln_bias = ln_bias.view;
  p.grid = grid.view;
  p.y = y.view;
  p.mean = mean.view;
  p.rstd = rstd.view;
  return p;
}

// The two argument lists, once for every processor: run(params, where, stream) does the work, where is a
// device index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& y, const Argument& mean,
               const Argument& rstd, const Argument& x, const Argument& weight, const Argument& ln_weight,
               const Argument& ln_bias, const Argument& grid, double inv_denominator, double eps) {
    Params p = make_params(inv_denominator, eps, x, weight, ln_weight, ln_bias, grid, y, mean, rstd);
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

template <class Run>
auto backward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Argument& grad_x,
               const Argument& grad_weight, const Argument& grad_ln_weight, const Argument& grad_ln_bias,
               const Argument& grad_grid, const Argument& grad_y, const Argument& mean, const Argument& rstd,
               const Argument& x, const Argument& weight, const Argument& ln_weight, const Argument& ln_bias,
               const Argument& grid, double inv_denominator, double eps) {
    Params p = make_params(inv_denominator, eps, x, weight, ln_weight, ln_bias, grid, {}, mean, rstd);
    p.grad_y = grad_y.view;
    p.grad_x = grad_x.view;
    p.grad_weight = grad_weight.view;
    p.grad_ln_weight = grad_ln_weight.view;
    p.grad_ln_bias = grad_ln_bias.view;
    p.grad_grid = grad_grid.view;
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "kan_linear_forward", forward_with, forward);
  VITKERNELS_BIND(module, "kan_linear_backward", backward_with, backward);
#if VITKERNELS_WITH_CUDA
  module.def("kan_linear_forward_workspace_cuda",
             [](const Argument& y, const Argument& mean, const Argument& rstd, const Argument& x,
                const Argument& weight, const Argument& ln_weight, const Argument& ln_bias,
                const Argument& grid, double inv_denominator, double eps) {
               return forward_workspace_cuda(
                   make_params(inv_denominator, eps, x, weight, ln_weight, ln_bias, grid, y, mean, rstd));
             });
  module.def(
      "kan_linear_backward_workspace_cuda",
      [](const Argument& grad_x, const Argument& grad_weight, const Argument& grad_ln_weight,
         const Argument& grad_ln_bias, const Argument& grad_grid, const Argument&, const Argument& mean,
         const Argument& rstd, const Argument& x, const Argument& weight, const Argument& ln_weight,
         const Argument& ln_bias, const Argument& grid, double inv_denominator, double eps) {
        Params p = make_params(inv_denominator, eps, x, weight, ln_weight, ln_bias, grid, {}, mean, rstd);
        p.grad_x = grad_x.view;
        p.grad_weight = grad_weight.view;
        p.grad_ln_weight = grad_ln_weight.view;
        p.grad_ln_bias = grad_ln_bias.view;
        p.grad_grid = grad_grid.view;
        return backward_workspace_cuda(p);
      });
#endif
}

}  // namespace vitkernels::kan_linear
