// What every operator's bind.cpp needs to take tensors from Python.
#pragma once
#include "vitkernels/params.h"
#include "vitkernels/python.h"
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

  bool is_plain(PyObject* object) const {
    return table != nullptr && (Py_TYPE(object) == tensor || Py_TYPE(object) == parameter);
  }
  bool lends(PyObject* object) const {
    return is_plain(object) || (table != nullptr && PyType_IsSubtype(Py_TYPE(object), tensor));
  }
};
extern TensorExchange exchange;

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

// False for a dtype that the parameter does not take; the second reads the tuple.
bool read_borrowed(PyObject* object, Argument* argument, bool indices = false);
bool read_tuple(PyObject* object, Argument* argument, bool indices = false);
bool read(PyObject* object, Argument* argument);
bool read(PyObject* object, Indices* argument);

using python::define;

// run(params, where, stream) for either processor, one type for both, so that what takes Python's arguments
// is compiled once: `where` is the number of threads or the device.
template <class Params>
struct Entry {
  void (*cpu)(const Params&, int);
  void (*cuda)(const Params&, Stream);

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
#define VITKERNELS_BIND_CPU(module, name, with, entry) \
  ::vitkernels::define(module, name, with(::vitkernels::entry_of(entry)))
#else
#define VITKERNELS_BIND_CPU(module, name, with, entry)
#endif

#if VITKERNELS_WITH_CUDA
#define VITKERNELS_BIND_CUDA(module, name, with, entry) \
  ::vitkernels::define(module, name, with(::vitkernels::entry_of(entry)))
#else
#define VITKERNELS_BIND_CUDA(module, name, with, entry)
#endif
