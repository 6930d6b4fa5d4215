#include "module_state.h"

namespace resnet_fused {
namespace {

bool holds(PyObject* dict, PyObject* items) {
  if (PyDict_Size(dict) * 2 != PyTuple_GET_SIZE(items)) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0, i = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (PyTuple_GET_ITEM(items, i) != key || PyTuple_GET_ITEM(items, i + 1) != value) return false;
    i += 2;
  }
  return true;
}

}  // namespace

bool unchanged(const pybind11::tuple& snapshot) {
  PyObject* classes = PyTuple_GET_ITEM(snapshot.ptr(), 0);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(classes); i += 2)
    if (reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(classes, i))) != PyTuple_GET_ITEM(classes, i + 1))
      return false;
  for (Py_ssize_t i = 1; i + 1 < PyTuple_GET_SIZE(snapshot.ptr()); i += 2)
    if (!holds(PyTuple_GET_ITEM(snapshot.ptr(), i), PyTuple_GET_ITEM(snapshot.ptr(), i + 1))) return false;
  return true;
}

}  // namespace resnet_fused
