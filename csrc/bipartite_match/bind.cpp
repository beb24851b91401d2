#include "vitkernels/bind.h"

#include "bipartite_match.h"

namespace py = pybind11;

namespace vitkernels::bipartite_match {
namespace {

Params make_params(const Argument& metric, int64_t merged, bool class_token, bool distill_token) {
  Params p;
  p.dtype = metric.dtype;
  p.batch = metric.shape[0];
  p.tokens = metric.shape[1];
  p.channels = static_cast<int>(metric.shape[2]);
  p.merged = merged;
  p.class_token = class_token;
  p.distill_token = distill_token;
  p.metric = metric.view;
  return p;
}

// The argument list, once for every processor: run(params, where, stream) does the work, where is a device
// index or a number of threads.
template <class Run>
auto forward_with(Run run) {
  return [run](int where, uintptr_t stream, uintptr_t workspace, const Indices& rows, const Indices& starts,
               const Indices& members, const Indices& src, const Indices& dst, const Argument& metric,
               int64_t merged, bool class_token, bool distill_token) {
    Params p = make_params(metric, merged, class_token, distill_token);
    p.rows = rows.view;
    p.starts = starts.view;
    p.members = members.view;
    p.src = src.view;
    p.dst = dst.view;
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, where, reinterpret_cast<Stream>(stream));
  };
}

}  // namespace

void bind(py::module_& module) {
  VITKERNELS_BIND(module, "bipartite_match_forward", forward_with, forward);
#if VITKERNELS_WITH_CUDA
  module.def("bipartite_match_workspace_cuda",
             [](const Argument& metric, int64_t merged, bool class_token, bool distill_token) {
               return workspace_cuda(make_params(metric, merged, class_token, distill_token));
             });
#endif
}

}  // namespace vitkernels::bipartite_match
