#include <stdexcept>
#include <string>

#include "vitkernels/bind.h"
#include "vitkernels/cpu_dispatch.h"
#include "vitkernels/fingerprint.h"
#include "vitkernels/fresh_memory.h"
#include "vitkernels/parallel.h"
#if VITKERNELS_WITH_CUDA
#include "vitkernels/runtime.h"
#endif

namespace vitkernels {
#define VITKERNELS_OPERATOR(name) \
  namespace name {                \
  void bind(PyObject* module);    \
  }
VITKERNELS_BOUND_OPERATORS
#undef VITKERNELS_OPERATOR
}  // namespace vitkernels

namespace {

using vitkernels::define;
using vitkernels::exchange;
namespace python = vitkernels::python;

void use_exchange(PyObject* table, PyObject* tensor, PyObject* parameter) {
  const void* pointer = PyCapsule_GetPointer(table, PyCapsule_GetName(table));
  if (pointer == nullptr) throw python::ErrorSet();
  const auto* offered = static_cast<const vitkernels::DLPackExchange*>(pointer);
  if (offered->header.version.major != 1 || offered->borrow == nullptr)
    throw std::runtime_error("unknown version of DLPack's exchange table");
  if (!PyType_Check(tensor) || !PyType_Check(parameter)) throw std::runtime_error("expected two types");
  exchange.tensor = reinterpret_cast<PyTypeObject*>(Py_NewRef(tensor));
  exchange.parameter = reinterpret_cast<PyTypeObject*>(Py_NewRef(parameter));
  exchange.table = offered;
}

void check_tuple(PyObject* object) {
  if (PyTuple_Check(object)) return;
  PyErr_SetString(PyExc_TypeError, "expected a tuple");
  throw python::ErrorSet();
}

bool is_true(PyObject* result) {
  if (result == nullptr) throw python::ErrorSet();
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
    if (text == nullptr) throw python::ErrorSet();
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
PyObject* signature(PyObject* tensors, PyObject* options) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  check_tuple(tensors);
  check_tuple(options);
  std::string bytes;
  bytes.reserve(64 * (PyTuple_GET_SIZE(tensors) + 1));
  bool gradient = false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) {
    PyObject* const item = PyTuple_GET_ITEM(tensors, i);
    if (item == Py_None) {
      bytes.push_back('-');
      continue;
    }
    vitkernels::DLTensor tensor;
    if (!exchange.is_plain(item)) Py_RETURN_NONE;
    if (is_true(PyObject_CallMethodNoArgs(item, is_neg))) Py_RETURN_NONE;
    if (exchange.table->borrow(item, &tensor) != 0) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    gradient = gradient || is_true(PyObject_GetAttr(item, requires_grad));
    bytes.push_back(static_cast<char>(tensor.ndim));
    bytes.append(reinterpret_cast<const char*>(&tensor.dtype), sizeof(tensor.dtype));
    bytes.append(reinterpret_cast<const char*>(&tensor.device), sizeof(tensor.device));
    bytes.append(reinterpret_cast<const char*>(tensor.shape), sizeof(int64_t) * tensor.ndim);
  }
  if (!append_option(&bytes, options)) Py_RETURN_NONE;
  PyObject* const packed = PyBytes_FromStringAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size()));
  return packed == nullptr ? nullptr : Py_BuildValue("(NO)", packed, gradient ? Py_True : Py_False);
}

// 16 bytes that follow from the dtypes, shapes, strides and elements of tensors and Nones. None where a
// tensor is not a plain dense one in the memory of the CPU.
PyObject* fingerprint(PyObject* tensors) {
  check_tuple(tensors);
  vitkernels::Fingerprint result;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) {
    PyObject* const item = PyTuple_GET_ITEM(tensors, i);
    if (item == Py_None) {
      result.add(0);
      continue;
    }
    vitkernels::Argument tensor;
    if (exchange.table == nullptr) {
      if (!vitkernels::read_tuple(item, &tensor)) Py_RETURN_NONE;
    } else {
      vitkernels::DLTensor lent;
      if (!exchange.is_plain(item)) Py_RETURN_NONE;
      if (exchange.table->borrow(item, &lent) != 0) {
        PyErr_Clear();
        Py_RETURN_NONE;
      }
      constexpr int CPU = 1;
      if (lent.device.type != CPU || !vitkernels::read_borrowed(item, &tensor)) Py_RETURN_NONE;
    }
    result.add(static_cast<uint64_t>(tensor.dtype) * 8 + tensor.ndim + 1);
    int64_t count = 1, reach = 1;
    for (int i = 0; i < tensor.ndim; ++i) {
      result.add(tensor.shape[i]);
      result.add(tensor.view.stride[i]);
      count *= tensor.shape[i];
      reach += (tensor.shape[i] - 1) * tensor.view.stride[i];
    }
    if (count != 0 && count != reach) Py_RETURN_NONE;
    constexpr size_t bytes[] = {8, 4, 2, 2};
    result.add(tensor.view.data, count * bytes[static_cast<int>(tensor.dtype)]);
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(result.value), sizeof(result.value));
}

PyObject* cuda_status() {
#if VITKERNELS_WITH_CUDA
  const vitkernels::CudaStatus cuda = vitkernels::cuda_status();
  return Py_BuildValue("{s:i,s:i,s:i,s:s}", "runtime", cuda.runtime_version, "driver", cuda.driver_version,
                       "devices", cuda.devices, "error", cuda.error.c_str());
#else
  return PyDict_New();
#endif
}

void fill(PyObject* module) {
  define(module, "use_exchange", &use_exchange);
  define(module, "signature", &signature);
  define(module, "fingerprint", &fingerprint);
  define(module, "expect_large_result",
         [](void* data, uintptr_t bytes) { vitkernels::expect_large_result(data, bytes); });
  define(module, "cpu_isa", &vitkernels::cpu_isa);
  define(module, "openmp_runtime", &vitkernels::openmp_runtime);
  define(module, "cuda_status", &cuda_status);
  python::add_value(module, "version", python::to_python(VITKERNELS_VERSION));
  python::add_value(module, "compiler", python::to_python(VITKERNELS_COMPILER));
  // Empty without CUDA kernels.
  python::add_value(module, "cuda_archs", python::to_python(VITKERNELS_CUDA_ARCHS));

  const char* const operators[] = {
#define VITKERNELS_OPERATOR(name) #name,
      VITKERNELS_BOUND_OPERATORS
#undef VITKERNELS_OPERATOR
  };
  const Py_ssize_t count = sizeof(operators) / sizeof(operators[0]);
  PyObject* const names = PyTuple_New(count);
  if (names == nullptr) throw python::ErrorSet();
  for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SET_ITEM(names, i, python::to_python(operators[i]));
  python::add_value(module, "operators", names);
#define VITKERNELS_OPERATOR(name) vitkernels::name::bind(module);
  VITKERNELS_BOUND_OPERATORS
#undef VITKERNELS_OPERATOR
}

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  return python::make_module("vitkernels._native", &fill);
}
