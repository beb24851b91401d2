// The test-only module _twin: the CUDA kernels on host fibers, under the names _native gives them on the
// device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>

#include "probe.h"
#include "traffic.h"
#include "vitkernels/device.h"
#include "watch.h"

namespace py = pybind11;

namespace vitkernels {

#define VITKERNELS_OPERATOR(name) \
  namespace name {                \
  void bind(py::module_& module); \
  }
VITKERNELS_TWIN_OPERATORS
#undef VITKERNELS_OPERATOR

namespace {

// Pointers cross as integers (tensor.data_ptr()).
template <typename T>
using wire_t = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <typename T>
T unwire(wire_t<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

template <typename... Arguments>
void define(py::module_& module, const char* name, void (*function)(Arguments...)) {
  module.def(name, [function](wire_t<Arguments>... arguments) {
    py::gil_scoped_release release;
    function(unwire<Arguments>(arguments)...);
  });
}

}  // namespace
}  // namespace vitkernels

PYBIND11_MODULE(_twin, module) {
  using namespace vitkernels;
  module.def("set_processors", &twin::set_processors,
             "How many multiprocessors kernels that choose by them find.");
  module.def("set_seed", &twin::set_seed, "The order of warps, lanes and blocks from the next launch on.");
  module.def("watch", &twin::watch::set_enabled, "Whether hazards are errors (csrc/twin/watch.h).");
  module.def("ignore_barriers", &twin::watch::ignore_barriers, "As if these ordered nothing, by number.");
  module.def(
      "barriers",
      [] {
        std::vector<std::tuple<uint32_t, bool, std::string>> result;
        for (const auto& b : twin::watch::barriers()) result.emplace_back(b.code, b.of_warp, b.line);
        return result;
      },
      "(number, of a warp, line) of every barrier that a launch has met so far.");
  module.def("count_traffic", &twin::traffic::set_enabled, "From now on, from zero (csrc/twin/traffic.h).");
  module.def(
      "traffic",
      [] {
        std::vector<std::tuple<std::string, std::string, bool, bool, int64_t, int64_t, int64_t>> result;
        for (const auto& r : twin::traffic::rows())
          result.emplace_back(r.kernel, r.line, r.shared, r.writes, r.requests, r.taken, r.least);
        return result;
      },
      "(kernel, line, of shared memory, writes, requests of warps, wavefronts or sectors taken, the least).");

#define VITKERNELS_PROBE(name) define(module, #name, probe::name)
  VITKERNELS_PROBE(exchange_in_block);
  VITKERNELS_PROBE(exchange_in_warp);
  VITKERNELS_PROBE(collectives_f32);
  VITKERNELS_PROBE(collectives_f64);
  VITKERNELS_PROBE(collectives_i32);
  VITKERNELS_PROBE(collectives_u32);
  VITKERNELS_PROBE(diverge);
  VITKERNELS_PROBE(count_positive);
  VITKERNELS_PROBE(dependent_launch);
  VITKERNELS_PROBE(write_from_blocks);
  VITKERNELS_PROBE(positions);
  VITKERNELS_PROBE(launch_shape);
  VITKERNELS_PROBE(write_shared);
  VITKERNELS_PROBE(write_global);
  VITKERNELS_PROBE(read_shared_unwritten);
  VITKERNELS_PROBE(write_local);
  VITKERNELS_PROBE(write_apart);
  VITKERNELS_PROBE(copy_vectors_16);
  VITKERNELS_PROBE(copy_vectors_64);
  VITKERNELS_PROBE(pipeline);
  VITKERNELS_PROBE(multiply_half);
  VITKERNELS_PROBE(multiply_bfloat16);
  VITKERNELS_PROBE(multiply_group_half);
  VITKERNELS_PROBE(multiply_group_bfloat16);
  VITKERNELS_PROBE(flawed_product);
  VITKERNELS_PROBE(copy_matrix_tile);
  VITKERNELS_PROBE(load_matrices);
  VITKERNELS_PROBE(round_half);
  VITKERNELS_PROBE(round_bfloat16);
  VITKERNELS_PROBE(widen_half);
  VITKERNELS_PROBE(widen_bfloat16);
  VITKERNELS_PROBE(pack_half);
  VITKERNELS_PROBE(pack_bfloat16);
  VITKERNELS_PROBE(special_functions);
#undef VITKERNELS_PROBE

#define VITKERNELS_OPERATOR(name) name::bind(module);
  VITKERNELS_TWIN_OPERATORS
#undef VITKERNELS_OPERATOR
}
