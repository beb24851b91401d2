#include <pybind11/pybind11.h>

#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/parallel.h"
#if VITKERNELS_WITH_CUDA
#include "vitkernels/runtime.h"
#endif

namespace py = pybind11;

namespace vitkernels::window_attention {
void bind(py::module_& module);
}

PYBIND11_MODULE(_native, module) {
  module.attr("version") = VITKERNELS_VERSION;
  module.attr("compiler") = VITKERNELS_COMPILER;
  module.attr("cuda_archs") = VITKERNELS_CUDA_ARCHS;  // empty without CUDA kernels
  module.def("cpu_isa", &vitkernels::cpu_isa);
  module.def("openmp_runtime", &vitkernels::openmp_runtime);

  module.def("cuda_status", [] {
    py::dict status;
#if VITKERNELS_WITH_CUDA
    const vitkernels::CudaStatus cuda = vitkernels::cuda_status();
    status["runtime"] = cuda.runtime_version;
    status["driver"] = cuda.driver_version;
    status["devices"] = cuda.devices;
    status["error"] = cuda.error;
#endif
    return status;
  });

  vitkernels::window_attention::bind(module);
}
