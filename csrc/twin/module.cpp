// The test-only module _twin: the CUDA kernels on host fibers, under the names _native gives them on the
// device.
#include "probe.h"
#include "vitkernels/device.h"
#include "vitkernels/python.h"

namespace vitkernels {

#define VITKERNELS_OPERATOR(name) \
  namespace name {                \
  void bind(PyObject* module);    \
  }
VITKERNELS_TWIN_OPERATORS
#undef VITKERNELS_OPERATOR

namespace {

template <class... Arguments>
void define_probe(PyObject* module, const char* name, void (*function)(Arguments...)) {
  python::define(module, name, [function](Arguments... arguments) {
    python::Released released;
    function(arguments...);
  });
}

void fill(PyObject* module) {
  python::define(module, "set_seed",
                 &twin::set_seed);  // the order of warps, lanes, blocks from the next launch on

#define VITKERNELS_PROBE(name) define_probe(module, #name, probe::name)
  VITKERNELS_PROBE(exchange_in_block);
  VITKERNELS_PROBE(exchange_in_warp);
  VITKERNELS_PROBE(collectives_f32);
  VITKERNELS_PROBE(collectives_f64);
  VITKERNELS_PROBE(collectives_i32);
  VITKERNELS_PROBE(collectives_u32);
  VITKERNELS_PROBE(diverge);
  VITKERNELS_PROBE(count_positive);
  VITKERNELS_PROBE(positions);
  VITKERNELS_PROBE(launch_shape);
  VITKERNELS_PROBE(write_shared);
  VITKERNELS_PROBE(write_global);
  VITKERNELS_PROBE(read_shared_unwritten);
  VITKERNELS_PROBE(write_local);
  VITKERNELS_PROBE(copy_vectors_16);
  VITKERNELS_PROBE(copy_vectors_64);
  VITKERNELS_PROBE(pipeline);
  VITKERNELS_PROBE(multiply_half);
  VITKERNELS_PROBE(multiply_bfloat16);
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

}  // namespace
}  // namespace vitkernels

PyMODINIT_FUNC PyInit__twin() {
  return vitkernels::python::make_module("_twin", &vitkernels::fill);
}
