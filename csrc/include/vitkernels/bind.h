// What every operator's bind.cpp needs to take tensors from Python.
#pragma once
#include <pybind11/pybind11.h>

#include "vitkernels/params.h"
#if VITKERNELS_WITH_CUDA
#include "vitkernels/runtime.h"
#endif

namespace vitkernels {

// The part of DLPack's C exchange table (DLPack 1.3) that is read here. A table lends a tensor's metadata for
// the price of a C call and needs no torch headers; torch offers one since 2.10.
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchange {
  struct {
    struct {
      uint32_t major, minor;
    } version;
    void* previous;
  } header;
  void *allocate, *import_tensor, *export_tensor;
  int (*borrow)(void* object, DLTensor* result);
  void* current_stream;
};

struct TensorExchange {
  const DLPackExchange* table = nullptr;
  PyTypeObject* tensor = nullptr;  // torch.Tensor and torch.nn.Parameter, kept alive for good
  PyTypeObject* parameter = nullptr;
  PyObject* is_neg = nullptr;  // descriptors of torch.Tensor, likewise
  PyObject* requires_grad = nullptr;

  bool is_plain(PyObject* object) const {
    return table != nullptr && (Py_TYPE(object) == tensor || Py_TYPE(object) == parameter);
  }
  bool lends(PyObject* object) const {
    return is_plain(object) || (table != nullptr && PyType_IsSubtype(Py_TYPE(object), tensor));
  }
};
inline TensorExchange exchange;

// A tensor argument: None, a torch.Tensor, or where there is no exchange table a tuple
// (address, shape, strides, dtype).
struct Argument {
  View view;
  int ndim = 0;
  int64_t shape[5] = {0, 0, 0, 0, 0};
  DType dtype = DType::f32;
};

// A tensor of int32, such as those of a merge plan. Its dtype says nothing.
struct Indices : Argument {};

// What vitkernels/core/native.py calls int32. No kernel computes in it, so it is no DType.
constexpr long kInt32 = 4;

// False for a dtype that no kernel takes.
inline bool read_dtype(const DLTensor& tensor, DType* dtype) {
  constexpr int FLOAT = 2, BFLOAT = 4;
  const auto& type = tensor.dtype;
  if (type.lanes != 1) return false;
  if (type.code == FLOAT && type.bits == 64) return *dtype = DType::f64, true;
  if (type.code == FLOAT && type.bits == 32) return *dtype = DType::f32, true;
  if (type.code == FLOAT && type.bits == 16) return *dtype = DType::f16, true;
  if (type.code == BFLOAT && type.bits == 16) return *dtype = DType::bf16, true;
  return false;
}

inline bool is_int32(const DLTensor& tensor) {
  constexpr int INT = 0;
  return tensor.dtype.code == INT && tensor.dtype.bits == 32 && tensor.dtype.lanes == 1;
}

inline bool read_borrowed(PyObject* object, Argument* argument, bool indices = false) {
  DLTensor tensor;
  if (exchange.table->borrow(object, &tensor) != 0) throw pybind11::error_already_set();
  if (tensor.ndim > 5 || !(indices ? is_int32(tensor) : read_dtype(tensor, &argument->dtype))) return false;
  argument->view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  argument->ndim = tensor.ndim;
  for (int i = 0; i < tensor.ndim; ++i) {
    argument->shape[i] = tensor.shape[i];
    argument->view.stride[i] = tensor.strides[i];
  }
  return true;
}

inline bool read_tuple(PyObject* object, Argument* argument, bool indices = false) {
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
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  if ((dtype == kInt32) != indices) return false;
  if (!indices) argument->dtype = static_cast<DType>(dtype);
  return true;
}

}  // namespace vitkernels

namespace pybind11::detail {

template <>
struct type_caster<vitkernels::Argument> {
  PYBIND11_TYPE_CASTER(vitkernels::Argument, const_name("torch.Tensor | tuple | None"));

  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
    if (vitkernels::exchange.lends(source.ptr())) return vitkernels::read_borrowed(source.ptr(), &value);
    return vitkernels::read_tuple(source.ptr(), &value);
  }
};

template <>
struct type_caster<vitkernels::Indices> {
  PYBIND11_TYPE_CASTER(vitkernels::Indices, const_name("torch.Tensor | tuple | None"));

  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
    if (vitkernels::exchange.lends(source.ptr()))
      return vitkernels::read_borrowed(source.ptr(), &value, true);
    return vitkernels::read_tuple(source.ptr(), &value, true);
  }
};

}  // namespace pybind11::detail

namespace vitkernels {

// run(params, where, stream) on either processor, `where` being the number of threads or the device. One type
// for both, since what pybind11 makes of a function's arguments is by far the most of what a binding
// compiles.
template <class Params>
struct Entry {
  void (*cpu)(const Params&, int) = nullptr;
  void (*cuda)(const Params&, Stream) = nullptr;

  void operator()(const Params& params, int where, Stream stream) const {
#if VITKERNELS_WITH_CUDA
    if (cuda != nullptr) {
      ScopedDevice scope(where);
      return cuda(params, stream);
    }
#endif
    (void)stream;
    cpu(params, where);
  }
};
template <class Params>
Entry<Params> entry_of(void (*cpu)(const Params&, int)) {
  return {cpu, nullptr};
}
template <class Params>
Entry<Params> entry_of(void (*cuda)(const Params&, Stream)) {
  return {nullptr, cuda};
}

}  // namespace vitkernels

// The same call for every processor that the module has kernels for. NAME_cpu runs ENTRY_cpu(params,
// threads), NAME_cuda ENTRY_cuda(params, stream) on a device; `with` turns run(params, where, stream) into
// the function of Python's arguments.
#define VITKERNELS_BIND(module, name, with, entry)                  \
  do {                                                              \
    VITKERNELS_BIND_CPU(module, name "_cpu", with, entry##_cpu);    \
    VITKERNELS_BIND_CUDA(module, name "_cuda", with, entry##_cuda); \
  } while (false)

#ifndef VITKERNELS_HOST_TWIN
#define VITKERNELS_BIND_CPU(module, name, with, entry) module.def(name, with(::vitkernels::entry_of(entry)))
#else
#define VITKERNELS_BIND_CPU(module, name, with, entry)
#endif

#if VITKERNELS_WITH_CUDA
#define VITKERNELS_BIND_CUDA(module, name, with, entry) module.def(name, with(::vitkernels::entry_of(entry)))
#else
#define VITKERNELS_BIND_CUDA(module, name, with, entry)
#endif
