#include "vitkernels/bind.h"

#include "residual_ffn.h"

namespace py = pybind11;

namespace vitkernels::residual_ffn {
namespace {

// The argument list, once for every use of the parameters: use(params, lead...), `lead` being the types of
// the arguments before the tensors.
template <class... Lead, class Use>
auto arguments(Use use) {
  return [use](Lead... lead, const Argument& out, const Argument& x, const Argument& weight1,
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
    p.weight1 = weight1.view;
    p.bias1 = bias1.view;
    p.weight2 = weight2.view;
    p.bias2 = bias2.view;
    p.scale1 = scale1.view;
    p.scale2 = scale2.view;
    p.dw_weight = dw_weight.view;
    p.dw_bias = dw_bias.view;
    return use(p, lead...);
  };
}

}  // namespace

void bind(py::module_& module) {
#ifndef VITKERNELS_HOST_TWIN
  module.def("residual_ffn_forward_cpu", arguments<int>([](Params& p, int threads) {
               // All positions of a map are one step apart.
               for (View* map : {&p.x, &p.out}) map->stride[2] = map->stride[p.width == 1 ? 2 : 3];
               py::gil_scoped_release release;
               forward_cpu(p, threads);
             }));
#endif
#if VITKERNELS_WITH_CUDA
  module.def(
      "residual_ffn_forward_cuda",
      arguments<int, uintptr_t, uintptr_t>([](Params& p, int device, uintptr_t stream, uintptr_t workspace) {
        p.workspace = reinterpret_cast<void*>(workspace);
        py::gil_scoped_release release;
        ScopedDevice scope(device);
        forward_cuda(p, reinterpret_cast<Stream>(stream));
      }));
  module.def("residual_ffn_workspace_cuda", arguments<int>([](Params& p, int device) {
               ScopedDevice scope(device);
               return forward_workspace_cuda(p);
             }));
#endif
}

}  // namespace vitkernels::residual_ffn
