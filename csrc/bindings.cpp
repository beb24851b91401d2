#include <cstring>

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
  exchange.is_neg = py::getattr(tensor, "is_neg").release().ptr();
  exchange.requires_grad = py::getattr(tensor, "requires_grad").release().ptr();
  exchange.table = offered;
}

// Bytes of a fixed room, so that a signature takes no allocation but its own. What does not fit is left out
// and remembered.
struct Bytes {
  static constexpr size_t kRoom = 2048;
  char data[kRoom];
  size_t size = 0;
  bool full = false;

  void append(const void* from, size_t count) {
    if (count > kRoom - size) {
      full = true;
      return;
    }
    std::memcpy(data + size, from, count);
    size += count;
  }
  void append(char kind) { append(&kind, 1); }
  template <class T>
  void append(char kind, const T& value) {
    append(kind);
    append(&value, sizeof(value));
  }
};

// Types count: 4 and 4.0, 1 and True are different options. False for what is no plain value.
bool append_option(Bytes* bytes, PyObject* option) {
  if (option == Py_None) {
    bytes->append('n');
  } else if (PyBool_Check(option)) {
    bytes->append('b', option == Py_True);
  } else if (PyLong_CheckExact(option)) {
    int overflow = 0;
    bytes->append('i', PyLong_AsLongLongAndOverflow(option, &overflow));
    if (overflow != 0) return false;
  } else if (PyFloat_CheckExact(option)) {
    bytes->append('f', PyFloat_AS_DOUBLE(option));
  } else if (PyUnicode_CheckExact(option)) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(option, &size);
    if (text == nullptr) throw py::error_already_set();
    bytes->append('s', size);
    bytes->append(text, size);
  } else if (PyTuple_CheckExact(option)) {
    bytes->append('t', PyTuple_GET_SIZE(option));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(option); ++i)
      if (!append_option(bytes, PyTuple_GET_ITEM(option, i))) return false;
  } else {
    return false;
  }
  return true;
}

bool is_true(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  const bool value = result == Py_True;
  Py_DECREF(result);
  return value;
}

// Whether there are elements but no memory for them: the zeros that automatic differentiation makes
// (torch._efficientzerotensor), which PyTorch writes out for its operators alone.
bool lacks_memory(const vitkernels::DLTensor& tensor) {
  if (tensor.data != nullptr) return false;
  for (int i = 0; i < tensor.ndim; ++i)
    if (tensor.shape[i] == 0) return false;
  return true;
}

// False where the tensor is no plain strided one, so that its values are not simply what its memory holds.
bool append_tensor(Bytes* bytes, PyObject* object, bool* gradient) {
  if (!exchange.is_plain(object) || is_true(PyObject_CallOneArg(exchange.is_neg, object))) return false;
  vitkernels::DLTensor tensor;
  if (exchange.table->borrow(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  if (lacks_memory(tensor)) return false;
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  PyObject* const requires_grad = exchange.requires_grad;
  *gradient = *gradient || is_true(Py_TYPE(requires_grad)->tp_descr_get(requires_grad, object, type));
  bytes->append(static_cast<char>(tensor.ndim));
  bytes->append(&tensor.dtype, sizeof(tensor.dtype));
  bytes->append(&tensor.device, sizeof(tensor.device));
  bytes->append(tensor.shape, sizeof(int64_t) * tensor.ndim);
  return true;
}

// signature(tensors, *options): (shapes, dtypes and devices of a tuple of tensors and Nones, and the options,
// as bytes; whether a tensor requires a gradient). None where a tensor is no plain one or an option no plain
// value. By hand rather than by pybind11, whose part of the time would be half: every call of an operator
// makes one.
PyObject* signature(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count < 1 || !PyTuple_Check(arguments[0])) {
    PyErr_SetString(PyExc_TypeError, "signature(tensors, *options): expected a tuple of tensors first");
    return nullptr;
  }
  try {
    Bytes bytes;
    bool gradient = false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments[0]); ++i) {
      PyObject* const tensor = PyTuple_GET_ITEM(arguments[0], i);
      if (tensor == Py_None)
        bytes.append('-');
      else if (!append_tensor(&bytes, tensor, &gradient))
        Py_RETURN_NONE;
    }
    for (Py_ssize_t i = 1; i < count; ++i)
      if (!append_option(&bytes, arguments[i])) Py_RETURN_NONE;
    if (bytes.full) Py_RETURN_NONE;
    PyObject* const key = PyBytes_FromStringAndSize(bytes.data, static_cast<Py_ssize_t>(bytes.size));
    PyObject* const result = key == nullptr ? nullptr : PyTuple_Pack(2, key, gradient ? Py_True : Py_False);
    Py_XDECREF(key);
    return result;
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

// are_dense(*tensors): whether the last dimension of each that is no None lies side by side. By hand as
// above.
PyObject* are_dense(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tensors[i] == Py_None) continue;
    vitkernels::DLTensor tensor;
    if (!exchange.lends(tensors[i])) Py_RETURN_FALSE;
    if (exchange.table->borrow(tensors[i], &tensor) != 0) return nullptr;
    const int last = tensor.ndim - 1;
    if (last < 0 || (tensor.strides[last] != 1 && tensor.shape[last] != 1)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

template <class F>
void define(py::module_& module, PyMethodDef* method, F function) {
  method->ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
  module.attr(method->ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(method, nullptr));
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
      if (lent.device.type != CPU || lacks_memory(lent)) return py::none();
      if (!vitkernels::read_borrowed(item.ptr(), &tensor)) return py::none();
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
  static PyMethodDef methods[] = {{"signature", nullptr, METH_FASTCALL, nullptr},
                                  {"are_dense", nullptr, METH_FASTCALL, nullptr}};
  define(module, &methods[0], &signature);
  define(module, &methods[1], &are_dense);
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
