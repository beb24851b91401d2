#include "vitkernels/bind.h"

#include "residual_ffn.h"

namespace py = pybind11;

namespace vitkernels::residual_ffn {

void bind(py::module_& module) {
#ifndef VITKERNELS_HOST_TWIN
  module.def("residual_ffn_forward_cpu",
             [](int threads, const Argument& out, const Argument& x, const Argument& weight1,
                const Argument& bias1, const Argument& weight2, const Argument& bias2, const Argument& scale1,
                const Argument& scale2, const Argument& dw_weight, const Argument& dw_bias) {
               Params p;
               p.dtype = x.dtype;
               p.vector_dtype = bias1.dtype;
               p.batch = x.shape[0];
               p.channels = static_cast<int>(x.shape[1]);
               p.height = static_cast<int>(x.shape[2]);
               p.width = static_cast<int>(x.shape[3]);
               p.hidden = static_cast<int>(weight1.shape[0]);
               p.x = x.view;
               p.out = out.view;
               // All positions of a map are one step apart.
               for (View* map : {&p.x, &p.out}) map->stride[2] = map->stride[p.width == 1 ? 2 : 3];
               p.weight1 = weight1.view;
               p.bias1 = bias1.view;
               p.weight2 = weight2.view;
               p.bias2 = bias2.view;
               p.scale1 = scale1.view;
               p.scale2 = scale2.view;
               p.dw_weight = dw_weight.view;
               p.dw_bias = dw_bias.view;
               py::gil_scoped_release release;
               forward_cpu(p, threads);
             });
#endif
}

}  // namespace vitkernels::residual_ffn
