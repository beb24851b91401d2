// pybind11 casters shared by every operator's bind.cpp.
#pragma once
#include <pybind11/pybind11.h>

#include "vitkernels/params.h"

namespace pybind11::detail {

// View <- None | (data_ptr, (stride, ...))
template <>
struct type_caster<vitkernels::View> {
  PYBIND11_TYPE_CASTER(vitkernels::View, const_name("tuple[int, tuple[int, ...]] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) {
      value = {};
      return true;
    }
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
    PyObject* strides = PyTuple_GET_ITEM(source.ptr(), 1);
    if (!PyTuple_Check(strides) || PyTuple_GET_SIZE(strides) > 5) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(strides); ++i)
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    return !PyErr_Occurred();
  }
};

}  // namespace pybind11::detail
