#include "vitkernels/bind.h"

#include <stdexcept>

#include "cascaded_group_attention.h"

namespace py = pybind11;

namespace vitkernels::cascaded_group_attention {
namespace {

// The inputs and options, in the order in which every entry takes them.
Params make_params(const Argument& x, const Argument& qkv_weight, const Argument& qkv_bias,
                   const Argument& dw_weight, const Argument& dw_bias, const Argument& attn_bias,
                   const Argument& proj_weight, const Argument& proj_bias, int window_h, int window_w,
                   const py::sequence& kernel_sizes, double scale, bool residual) {
  Params p;
  p.dtype = x.dtype;
  p.weight_dtype = qkv_weight.dtype;
  p.table_dtype = attn_bias.dtype;
  p.batch = x.shape[0];
  p.height = x.shape[2];
  p.width = x.shape[3];
  p.channels = static_cast<int>(x.shape[1]);
  p.num_heads = static_cast<int>(dw_weight.shape[0]);
  p.key_dim = static_cast<int>(dw_weight.shape[1]);
  p.kernel_max = static_cast<int>(dw_weight.shape[2]);
  p.window_h = window_h;
  p.window_w = window_w;
  if (p.num_heads > kMaxHeads || static_cast<int>(kernel_sizes.size()) != p.num_heads)
    throw std::invalid_argument("cascaded_group_attention: one kernel size a head, for up to 16 heads");
  for (int i = 0; i < p.num_heads; ++i) p.kernel_sizes[i] = kernel_sizes[i].cast<int>();
  p.scale = scale;
  p.residual = residual;
  p.x = x.view;
  p.qkv_weight = qkv_weight.view;
  p.qkv_bias = qkv_bias.view;
  p.dw_weight = dw_weight.view;
  p.dw_bias = dw_bias.view;
  p.attn_bias = attn_bias.view;
  p.proj_weight = proj_weight.view;
  p.proj_bias = proj_bias.view;
  return p;
}

// The argument lists, once for every processor: use(params, lead...) does the work, `lead` being the types of
// the arguments before the tensors; the first of them is a device index or a number of threads.
template <class... Lead, class Use>
auto forward_arguments(Use use) {
  return [use](Lead... lead, const Argument& out, const Argument& heads, const Argument& x,
               const Argument& qkv_weight, const Argument& qkv_bias, const Argument& dw_weight,
               const Argument& dw_bias, const Argument& attn_bias, const Argument& proj_weight,
               const Argument& proj_bias, int window_h, int window_w, const py::sequence& kernel_sizes,
               double scale, bool residual) {
    Params p = make_params(x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, proj_weight, proj_bias,
                           window_h, window_w, kernel_sizes, scale, residual);
    p.out = out.view;
    p.heads = heads.view;
    return use(p, lead...);
  };
}

// The same for everything that the backward takes.
template <class... Lead, class Use>
auto backward_arguments(Use use) {
  return [use](Lead... lead, const Argument& grad_x, const Argument& grad_qkv_weight,
               const Argument& grad_qkv_bias, const Argument& grad_dw_weight, const Argument& grad_dw_bias,
               const Argument& grad_attn_bias, const Argument& grad_proj_weight,
               const Argument& grad_proj_bias, const Argument& grad_out, const Argument& grad_heads,
               const Argument& heads, const Argument& x, const Argument& qkv_weight, const Argument& qkv_bias,
               const Argument& dw_weight, const Argument& dw_bias, const Argument& attn_bias,
               const Argument& proj_weight, const Argument& proj_bias, int window_h, int window_w,
               const py::sequence& kernel_sizes, double scale, bool residual) {
    Params p = make_params(x, qkv_weight, qkv_bias, dw_weight, dw_bias, attn_bias, proj_weight, proj_bias,
                           window_h, window_w, kernel_sizes, scale, residual);
    p.heads = heads.view;
    p.grad_out = grad_out.view;
    p.grad_heads = grad_heads.view;
    p.grad_x = grad_x.view;
    p.grad_qkv_weight = grad_qkv_weight.view;
    p.grad_qkv_bias = grad_qkv_bias.view;
    p.grad_dw_weight = grad_dw_weight.view;
    p.grad_dw_bias = grad_dw_bias.view;
    p.grad_attn_bias = grad_attn_bias.view;
    p.grad_proj_weight = grad_proj_weight.view;
    p.grad_proj_bias = grad_proj_bias.view;
    return use(p, lead...);
  };
}

template <class Run>
auto backward_with(Run run) {
  return backward_arguments<int, uintptr_t, uintptr_t>(
      [run](Params& p, int where, uintptr_t stream, uintptr_t workspace) {
        p.workspace = reinterpret_cast<void*>(workspace);
        py::gil_scoped_release release;
        run(p, where, reinterpret_cast<Stream>(stream));
      });
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "cascaded_group_attention_backward", backward_with, backward);
#ifndef VITKERNELS_HOST_TWIN
  module.def("cascaded_group_attention_forward_cpu",
             forward_arguments<int, uintptr_t>([](const Params& p, int threads, uintptr_t) {
               py::gil_scoped_release release;
               forward_cpu(p, threads);
             }));
#endif
#if VITKERNELS_WITH_CUDA
  module.def("cascaded_group_attention_forward_cuda",
             forward_arguments<int, uintptr_t, uintptr_t>(
                 [](Params& p, int device, uintptr_t stream, uintptr_t workspace) {
                   p.workspace = reinterpret_cast<void*>(workspace);
                   py::gil_scoped_release release;
                   ScopedDevice scope(device);
                   return forward_cuda(p, reinterpret_cast<Stream>(stream));
                 }));
  module.def("cascaded_group_attention_workspace_cuda",
             backward_arguments([](Params& p) { return backward_workspace_cuda(p); }));
#endif
}

}  // namespace vitkernels::cascaded_group_attention
