// What the files that include Python share. No others do. Addresses are integers in Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "merge.h"

namespace py = pybind11;
using arcmerge::DType;
using Address = std::uintptr_t;
using Count = std::int64_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(int code, const char* name);

// Every operation runs without the GIL.
using NoGil = py::call_guard<py::gil_scoped_release>;

void bind_merge(py::module_& module);
void bind_gemma2(py::module_& module);
