// Functions of C++ as functions of Python, over CPython's own interface. A binding is compiled for every
// operator and again for the tests' twin, so what does not depend on its arguments is in csrc/python.cpp.
#pragma once
#include <Python.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace vitkernels::python {

// Thrown where an error of Python is already set.
struct ErrorSet {};
// Thrown where an argument has a type or value that its parameter does not take.
struct Unreadable {
  int position;
};

// False, or an error of Python, for what the type cannot hold.
bool read(PyObject* object, bool* value);
bool read(PyObject* object, int* value);
bool read(PyObject* object, int64_t* value);
bool read(PyObject* object, uintptr_t* value);
bool read(PyObject* object, double* value);
bool read(PyObject* object, std::string* value);
bool read(PyObject* object, std::vector<int>* value);
inline bool read(PyObject* object, PyObject** value) {
  return *value = object, true;  // borrowed
}
// Other pointers cross as integers (tensor.data_ptr()).
template <class T>
bool read(PyObject* object, T** value) {
  uintptr_t address = 0;
  if (!read(object, &address)) return false;
  *value = reinterpret_cast<T*>(address);
  return true;
}

// New references; null, with an error of Python, where that fails. A PyObject* is one already.
inline PyObject* to_python(PyObject* value) {
  return value;
}
inline PyObject* to_python(int64_t value) {
  return PyLong_FromLongLong(value);
}
inline PyObject* to_python(const std::string& value) {
  return PyUnicode_FromStringAndSize(value.data(), static_cast<Py_ssize_t>(value.size()));
}

// The GIL is released for the scope.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  ~Released() { PyEval_RestoreThread(state_); }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  PyThreadState* state_;
};

// The exception in flight as an error of Python, raised by the function `name`; null.
PyObject* raise(const char* name) noexcept;
[[noreturn]] void refuse_count(Py_ssize_t got, int expected);
void add_function(PyObject* module, PyMethodDef* method, void* function);
// Takes the reference to the value.
void add_value(PyObject* module, const char* name, PyObject* value);
// What PyInit_<name> returns; `fill` adds to the module.
PyObject* make_module(const char* name, void (*fill)(PyObject* module)) noexcept;

template <class T>
T taken(PyObject* object, int position) {
  T value{};
  if (!read(object, &value)) throw Unreadable{position};
  return value;
}

// A function with what Python needs to call it. It lives as long as the process.
template <class Function, class Result, class... Parameters>
struct Bound {
  PyMethodDef method;
  Function function;

  template <size_t... I>
  PyObject* apply(PyObject* const* arguments, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<Result>) {
      function(taken<std::decay_t<Parameters>>(arguments[I], I)...);
      Py_RETURN_NONE;
    } else {
      return to_python(function(taken<std::decay_t<Parameters>>(arguments[I], I)...));
    }
  }

  static PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    auto* bound = static_cast<Bound*>(PyCapsule_GetPointer(self, nullptr));
    try {
      if (count != sizeof...(Parameters)) refuse_count(count, sizeof...(Parameters));
      return bound->apply(arguments, std::index_sequence_for<Parameters...>());
    } catch (...) {
      return raise(bound->method.ml_name);
    }
  }

  static void define(PyObject* module, const char* name, Function function) {
    const auto untyped = reinterpret_cast<void (*)()>(&call);
    auto* bound = new Bound{{name, reinterpret_cast<PyCFunction>(untyped), METH_FASTCALL, nullptr},
                            std::move(function)};
    add_function(module, &bound->method, bound);
  }
};

template <class Result, class... Parameters>
void define(PyObject* module, const char* name, Result (*function)(Parameters...)) {
  Bound<Result (*)(Parameters...), Result, Parameters...>::define(module, name, function);
}

template <class Function, class Result, class... Parameters>
void define_member(PyObject* module, const char* name, Function function,
                   Result (Function::*)(Parameters...) const) {
  Bound<Function, Result, Parameters...>::define(module, name, std::move(function));
}
// A lambda.
template <class Function, class = decltype(&Function::operator())>
void define(PyObject* module, const char* name, Function function) {
  define_member(module, name, std::move(function), &Function::operator());
}

}  // namespace vitkernels::python
