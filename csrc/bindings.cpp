#include <string>

#include "vitkernels/bind.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/fingerprint.h"
#include "vitkernels/fresh_memory.h"
#include "vitkernels/parallel.h"
#if VITKERNELS_WITH_CUDA
#include "vitkernels/runtime.h"
#endif

namespace py = pybind11;

namespace vitkernels {
#define VITKERNELS_OPERATOR(name) \
  namespace name {                \
  void bind(py::module_& module); \
  }
VITKERNELS_BOUND_OPERATORS
#undef VITKERNELS_OPERATOR
}  // namespace vitkernels

namespace {

using vitkernels::exchange;

void use_exchange(const py::capsule& table, const py::type& tensor, const py::type& parameter) {
  const auto* offered = table.get_pointer<const vitkernels::DLPackExchange>();
  if (offered->header.version.major != 1 || offered->borrow == nullptr)
    throw std::runtime_error("unknown version of DLPack's exchange table");
  exchange.tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  exchange.parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  exchange.table = offered;
}

bool is_true(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  const bool value = result == Py_True;
  Py_DECREF(result);
  return value;
}

template <class T>
void append(std::string* bytes, char kind, const T& value) {
  bytes->push_back(kind);
  bytes->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// Types count: 4 and 4.0, 1 and True are different options. False for what is no plain value.
bool append_option(std::string* bytes, PyObject* option) {
  if (option == Py_None) {
    bytes->push_back('n');
  } else if (PyBool_Check(option)) {
    append(bytes, 'b', option == Py_True);
  } else if (PyLong_CheckExact(option)) {
    int overflow = 0;
    append(bytes, 'i', PyLong_AsLongLongAndOverflow(option, &overflow));
    if (overflow != 0) return false;
  } else if (PyFloat_CheckExact(option)) {
    append(bytes, 'f', PyFloat_AS_DOUBLE(option));
  } else if (PyUnicode_CheckExact(option)) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(option, &size);
    if (text == nullptr) throw py::error_already_set();
    append(bytes, 's', size);
    bytes->append(text, size);
  } else if (PyTuple_CheckExact(option)) {
    append(bytes, 't', PyTuple_GET_SIZE(option));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(option); ++i)
      if (!append_option(bytes, PyTuple_GET_ITEM(option, i))) return false;
  } else {
    return false;
  }
  return true;
}

// (shapes, dtypes and devices of tensors or Nones, and the options, as bytes; whether a tensor requires a
// gradient). None where a tensor is no plain strided one, so that its values are not simply what its memory
// holds, or an option is no plain value.
py::object signature(const py::tuple& tensors, const py::tuple& options) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  std::string bytes;
  bytes.reserve(64 * (tensors.size() + 1));
  bool gradient = false;
  for (py::handle item : tensors) {
    if (item.is_none()) {
      bytes.push_back('-');
      continue;
    }
    vitkernels::DLTensor tensor;
    if (!exchange.is_plain(item.ptr())) return py::none();
    if (is_true(PyObject_CallMethodNoArgs(item.ptr(), is_neg))) return py::none();
    if (exchange.table->borrow(item.ptr(), &tensor) != 0) {
      PyErr_Clear();
      return py::none();
    }
    gradient = gradient || is_true(PyObject_GetAttr(item.ptr(), requires_grad));
    bytes.push_back(static_cast<char>(tensor.ndim));
    bytes.append(reinterpret_cast<const char*>(&tensor.dtype), sizeof(tensor.dtype));
    bytes.append(reinterpret_cast<const char*>(&tensor.device), sizeof(tensor.device));
    bytes.append(reinterpret_cast<const char*>(tensor.shape), sizeof(int64_t) * tensor.ndim);
  }
  if (!append_option(&bytes, options.ptr())) return py::none();
  return py::make_tuple(py::bytes(bytes), gradient);
}

// 16 bytes that follow from the dtypes, shapes, strides and elements of tensors and Nones. None where a
// tensor is not a plain dense one in the memory of the CPU.
py::object fingerprint(const py::tuple& tensors) {
  vitkernels::Fingerprint result;
  for (py::handle item : tensors) {
    if (item.is_none()) {
      result.add(0);
      continue;
    }
    vitkernels::Argument tensor;
    if (exchange.table == nullptr) {
      if (!vitkernels::read_tuple(item.ptr(), &tensor)) return py::none();
    } else {
      vitkernels::DLTensor lent;
      if (!exchange.is_plain(item.ptr())) return py::none();
      if (exchange.table->borrow(item.ptr(), &lent) != 0) {
        PyErr_Clear();
        return py::none();
      }
      constexpr int CPU = 1;
      if (lent.device.type != CPU || !vitkernels::read_borrowed(item.ptr(), &tensor)) return py::none();
    }
    result.add(static_cast<uint64_t>(tensor.dtype) * 8 + tensor.ndim + 1);
    int64_t count = 1, reach = 1;
    for (int i = 0; i < tensor.ndim; ++i) {
      result.add(tensor.shape[i]);
      result.add(tensor.view.stride[i]);
      count *= tensor.shape[i];
      reach += (tensor.shape[i] - 1) * tensor.view.stride[i];
    }
    if (count != 0 && count != reach) return py::none();
    constexpr size_t bytes[] = {8, 4, 2, 2};
    result.add(tensor.view.data, count * bytes[static_cast<int>(tensor.dtype)]);
  }
  return py::bytes(reinterpret_cast<const char*>(result.value), sizeof(result.value));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.def("use_exchange", &use_exchange);
  module.def("signature", &signature);
  module.def("fingerprint", &fingerprint);
  module.def("expect_large_result", [](uintptr_t data, size_t bytes) {
    vitkernels::expect_large_result(reinterpret_cast<void*>(data), bytes);
  });
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

  py::list operators;
#define VITKERNELS_OPERATOR(name) \
  vitkernels::name::bind(module); \
  operators.append(#name);
  VITKERNELS_BOUND_OPERATORS
#undef VITKERNELS_OPERATOR
  module.attr("operators") = py::tuple(operators);
}
