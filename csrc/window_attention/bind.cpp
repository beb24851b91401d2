#include <tuple>

#include "vitkernels/bind.h"

#include "window_attention.h"
#if VITKERNELS_WITH_CUDA
#include "vitkernels/runtime.h"
#endif

namespace py = pybind11;

namespace vitkernels::window_attention {
namespace {

// (dtype, bias_dtype, batch, heads, window_h, window_w, head_dim, value_dim, signed_bias, scale)
using Problem =
    std::tuple<int, int, int64_t, int64_t, int, int, int, int, bool, double>;

Params make_params(const Problem& problem, const View& q, const View& k, const View& v,
                   const View& bias_table, const View& out, const View& lse) {
  Params p;
  int dtype, bias_dtype;
  std::tie(dtype, bias_dtype, p.batch, p.heads, p.window_h, p.window_w, p.head_dim, p.value_dim,
           p.signed_bias, p.scale) = problem;
  p.dtype = static_cast<DType>(dtype);
  p.bias_dtype = static_cast<DType>(bias_dtype);
  p.q = q;
  p.k = k;
  p.v = v;
  p.bias_table = bias_table;
  p.out = out;
  p.lse = lse;
  return p;
}

// The two argument lists, once for every processor: run(params, where, stream) does the work, where
// is a device index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, const Problem& problem, View q, View k, View v,
               View bias_table, View out, View lse) {
    const Params p = make_params(problem, q, k, v, bias_table, out, lse);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

template <class Run>
auto backward_with(Run run) {
  return [run](int where, uintptr_t stream, const Problem& problem, View q, View k, View v,
               View bias_table, View out, View lse, View grad_out, View grad_lse, View grad_q,
               View grad_k, View grad_v, View grad_bias_table, uintptr_t workspace) {
    Params p = make_params(problem, q, k, v, bias_table, out, lse);
    p.grad_out = grad_out;
    p.grad_lse = grad_lse;
    p.grad_q = grad_q;
    p.grad_k = grad_k;
    p.grad_v = grad_v;
    p.grad_bias_table = grad_bias_table;
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
#ifndef VITKERNELS_HOST_TWIN
  module.def("window_attention_forward_cpu",
             forward_with([](const Params& p, int threads, Stream) { forward_cpu(p, threads); }));
  module.def("window_attention_backward_cpu",
             backward_with([](const Params& p, int threads, Stream) { backward_cpu(p, threads); }));
#endif
#if VITKERNELS_WITH_CUDA
  module.def("window_attention_forward_cuda",
             forward_with([](const Params& p, int device, Stream stream) {
               ScopedDevice scope(device);
               forward_cuda(p, stream);
             }));
  module.def("window_attention_backward_cuda",
             backward_with([](const Params& p, int device, Stream stream) {
               ScopedDevice scope(device);
               backward_cuda(p, stream);
             }));
  module.def("window_attention_workspace_cuda",
             [](const Problem& problem, bool grad_bias_table) {
               Params p = make_params(problem, {}, {}, {}, {}, {}, {});
               // Only whether the gradient is wanted matters for the size.
               p.grad_bias_table.data = grad_bias_table ? &p : nullptr;
               return backward_workspace_cuda(p);
             });
#endif
}

}  // namespace vitkernels::window_attention
