// arcmerge._C: the operations of merge.h and gemma2.h for Python.
#include "bind.h"

#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>

DType dtype_of(int code, const char* name) {
  if (code < 0 || code > 2)
    throw std::invalid_argument(std::string("'") + name + "' must be 0 (bf16), 1 (f16) or 2 (f32), got " +
                                std::to_string(code));
  return DType(code);
}

namespace {

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing();
#else
  return _Py_IsFinalizing();
#endif
}

std::terminate_handler previous_terminate = nullptr;

// Up to Python 3.13, a daemon thread that waits for the GIL while the interpreter shuts down is unwound by
// pthread_exit. The destructors that reacquire the GIL, those of pybind11 here and in torch, are noexcept, so that the
// unwinding would abort the whole process. Such a thread waits here instead, as since Python 3.14, and ends with the
// process.
[[noreturn]] void wait_for_exit() {
  if (!std::current_exception() && is_finalizing())
    for (;;) ::pause();
  if (previous_terminate) previous_terminate();
  std::abort();
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  previous_terminate = std::set_terminate(&wait_for_exit);
  using namespace py::literals;

  bind_merge(module);
  bind_gemma2(module);
  module.def("variants", &arcmerge::variants);
  module.def("variant", &arcmerge::variant);
  module.def("use_variant", &arcmerge::use_variant, "name"_a);

  if (const char* forced = std::getenv("ARCMERGE_CPU")) arcmerge::use_variant(forced);
}
