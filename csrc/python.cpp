#include "vitkernels/python.h"

#include <climits>
#include <new>
#include <stdexcept>

#include "vitkernels/bind.h"

namespace vitkernels {

TensorExchange exchange;

namespace python {
namespace {

// A reference that is given back.
struct Owned {
  PyObject* object;
  explicit Owned(PyObject* taken) : object(taken) {
    if (object == nullptr) throw ErrorSet();
  }
  ~Owned() { Py_DECREF(object); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
};

}  // namespace

bool read(PyObject* object, int64_t* value) {
  if (!PyLong_Check(object)) {
    if (!PyIndex_Check(object)) return false;
    return read(Owned(PyNumber_Index(object)).object, value);
  }
  int overflow = 0;
  *value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

bool read(PyObject* object, int* value) {
  int64_t wide = 0;
  if (!read(object, &wide) || wide < INT_MIN || wide > INT_MAX) return false;
  *value = static_cast<int>(wide);
  return true;
}

bool read(PyObject* object, uintptr_t* value) {
  if (!PyLong_Check(object)) return false;
  *value = PyLong_AsSize_t(object);
  if (*value == static_cast<uintptr_t>(-1) && PyErr_Occurred()) throw ErrorSet();
  return true;
}

bool read(PyObject* object, bool* value) {
  if (!PyLong_Check(object)) return false;  // bool is a subtype
  *value = PyObject_IsTrue(object) != 0;
  return true;
}

bool read(PyObject* object, double* value) {
  *value = PyFloat_AsDouble(object);
  if (*value == -1.0 && PyErr_Occurred()) throw ErrorSet();
  return true;
}

bool read(PyObject* object, std::string* value) {
  if (!PyUnicode_Check(object)) return false;
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object, &size);
  if (text == nullptr) throw ErrorSet();
  value->assign(text, size);
  return true;
}

bool read(PyObject* object, std::vector<int>* value) {
  const Owned items(PySequence_Fast(object, "expected a sequence of ints"));
  value->resize(PySequence_Fast_GET_SIZE(items.object));
  for (size_t i = 0; i < value->size(); ++i)
    if (!read(PySequence_Fast_GET_ITEM(items.object, i), &(*value)[i])) return false;
  return true;
}

PyObject* raise(const char* name) noexcept {
  try {
    throw;
  } catch (const ErrorSet&) {
  } catch (const Unreadable& argument) {
    if (!PyErr_Occurred())
      PyErr_Format(PyExc_TypeError, "%s: argument %d has a type or value that the kernels do not take", name,
                   argument.position);
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_Format(PyExc_RuntimeError, "%s: unknown exception", name);
  }
  return nullptr;
}

void refuse_count(Py_ssize_t got, int expected) {
  PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", expected, got);
  throw ErrorSet();
}

void add_value(PyObject* module, const char* name, PyObject* value) {
  const Owned held(value);
  if (PyModule_AddObjectRef(module, name, value) != 0) throw ErrorSet();
}

void add_function(PyObject* module, PyMethodDef* method, void* function) {
  const Owned self(PyCapsule_New(function, nullptr, nullptr)), name(PyModule_GetNameObject(module));
  add_value(module, method->ml_name, PyCFunction_NewEx(method, self.object, name.object));
}

PyObject* make_module(const char* name, void (*fill)(PyObject* module)) noexcept {
  static PyModuleDef definition;
  definition = {};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = name;
  definition.m_size = -1;
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  try {
    fill(module);
  } catch (...) {
    Py_DECREF(module);
    return raise(name);
  }
  return module;
}

}  // namespace python

namespace {

// False for a dtype that no kernel takes.
bool read_dtype(const DLTensor& tensor, DType* dtype) {
  constexpr int FLOAT = 2, BFLOAT = 4;
  const auto& type = tensor.dtype;
  if (type.lanes != 1) return false;
  if (type.code == FLOAT && type.bits == 64) return *dtype = DType::f64, true;
  if (type.code == FLOAT && type.bits == 32) return *dtype = DType::f32, true;
  if (type.code == FLOAT && type.bits == 16) return *dtype = DType::f16, true;
  if (type.code == BFLOAT && type.bits == 16) return *dtype = DType::bf16, true;
  return false;
}

bool is_int32(const DLTensor& tensor) {
  constexpr int INT = 0;
  return tensor.dtype.code == INT && tensor.dtype.bits == 32 && tensor.dtype.lanes == 1;
}

// What vitkernels/core/native.py calls int32. No kernel computes in it, so it is no DType.
constexpr long kInt32 = 4;

bool read_tensor(PyObject* object, Argument* argument, bool indices) {
  if (object == Py_None) return true;
  return exchange.lends(object) ? read_borrowed(object, argument, indices)
                                : read_tuple(object, argument, indices);
}

}  // namespace

bool read_borrowed(PyObject* object, Argument* argument, bool indices) {
  DLTensor tensor;
  if (exchange.table->borrow(object, &tensor) != 0) throw python::ErrorSet();
  if (tensor.ndim > 5 || !(indices ? is_int32(tensor) : read_dtype(tensor, &argument->dtype))) return false;
  argument->view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  argument->ndim = tensor.ndim;
  for (int i = 0; i < tensor.ndim; ++i) {
    argument->shape[i] = tensor.shape[i];
    argument->view.stride[i] = tensor.strides[i];
  }
  return true;
}

bool read_tuple(PyObject* object, Argument* argument, bool indices) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 4) return false;
  PyObject* shape = PyTuple_GET_ITEM(object, 1);
  PyObject* strides = PyTuple_GET_ITEM(object, 2);
  if (!PyTuple_Check(shape) || !PyTuple_Check(strides)) return false;
  if (PyTuple_GET_SIZE(shape) > 5 || PyTuple_GET_SIZE(shape) != PyTuple_GET_SIZE(strides)) return false;
  argument->view.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(object, 0));
  argument->ndim = static_cast<int>(PyTuple_GET_SIZE(shape));
  for (int i = 0; i < argument->ndim; ++i) {
    argument->shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
    argument->view.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
  }
  const long dtype = PyLong_AsLong(PyTuple_GET_ITEM(object, 3));
  if (PyErr_Occurred()) throw python::ErrorSet();
  if ((dtype == kInt32) != indices) return false;
  if (!indices) argument->dtype = static_cast<DType>(dtype);
  return true;
}

bool read(PyObject* object, Argument* argument) {
  return read_tensor(object, argument, false);
}
bool read(PyObject* object, Indices* argument) {
  return read_tensor(object, argument, true);
}

}  // namespace vitkernels
