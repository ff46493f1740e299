// arcmerge._C: the operations of arcmerge.h for Python, with addresses as integers. The only file that knows Python.
// python/arcmerge/_C.pyi has the signatures. Every operation runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "arcmerge.h"

namespace py = pybind11;
using arcmerge::DType;
using arcmerge::Operand;
using Address = std::uintptr_t;
using Count = std::int64_t;

namespace {

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(int code, const char* name) {
  if (code < 0 || code > 2)
    throw std::invalid_argument(std::string("'") + name + "' must be 0 (bf16), 1 (f16) or 2 (f32), got " +
                                std::to_string(code));
  return DType(code);
}

Operand make_operand(Address address, int dtype, int cast, Address rows, Count columns) {
  if (rows != 0 && columns < 1)
    throw std::invalid_argument("'columns' must be at least 1 where 'rows' is given, got " + std::to_string(columns));
  Operand operand;
  operand.address = at<const char>(address);
  operand.dtype = dtype_of(dtype, "dtype");
  operand.casts = cast != -1;
  if (operand.casts) operand.cast = dtype_of(cast, "cast");
  operand.rows = at<const std::uint64_t>(rows);
  operand.columns = columns;
  return operand;
}

bool vectors_are_rows(int along) {
  if (along != 0 && along != 1)
    throw std::invalid_argument("'along' must be 0 (vectors are columns) or 1 (vectors are rows), got " +
                                std::to_string(along));
  return along == 1;
}

const Operand* pointer(const std::optional<Operand>& operand) { return operand ? &*operand : nullptr; }

std::vector<double> gram(const std::vector<Operand>& operands, const std::optional<Operand>& base, Count first,
                         Count count) {
  std::vector<double> out(operands.size() * operands.size());
  arcmerge::gram(operands, pointer(base), first, count, out.data());
  return out;
}

void gram_vectors(const std::vector<Operand>& operands, const std::optional<Operand>& base, Count rows, Count columns,
                  int along, Address out) {
  const auto op = vectors_are_rows(along) ? arcmerge::gram_of_rows : arcmerge::gram_of_columns;
  op(operands, pointer(base), rows, columns, at<double>(out));
}

Count combine(Address out, int out_dtype, const std::vector<Operand>& operands, const std::vector<double>& coefficients,
              Count first, Count count) {
  const std::vector<float> rounded(coefficients.begin(), coefficients.end());
  return arcmerge::combine(at<void>(out), dtype_of(out_dtype, "out_dtype"), operands, rounded, first, count);
}

Count combine_vectors(Address out, int out_dtype, const std::vector<Operand>& operands, Address coefficients,
                      Count first, Count count, Count columns, int along) {
  const auto op = vectors_are_rows(along) ? arcmerge::combine_rows : arcmerge::combine_columns;
  return op(at<void>(out), dtype_of(out_dtype, "out_dtype"), operands, at<const float>(coefficients), first, count,
            columns);
}

Count nearswap(Address out, int out_dtype, const Operand& a, const Operand& b, double t, Count first, Count count) {
  return arcmerge::nearswap(at<void>(out), dtype_of(out_dtype, "out_dtype"), a, b, float(t), first, count);
}

void copy(Address out, Address source, std::size_t bytes) { std::memcpy(at<void>(out), at<const void>(source), bytes); }

void column_sums(const Operand& operand, Count rows, Count columns, Address out) {
  arcmerge::column_sums(operand, rows, columns, at<double>(out));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using namespace py::literals;
  const py::call_guard<py::gil_scoped_release> no_gil;

  module.attr("MAX_OPERANDS") = arcmerge::kMaxOperands;
  py::class_<Operand>(module, "Operand")
      .def(py::init(&make_operand), "address"_a, "dtype"_a, "cast"_a = -1, "rows"_a = 0, "columns"_a = 0);
  module.def("gram", &gram, "operands"_a, "base"_a, "first"_a, "count"_a, no_gil);
  module.def("gram_vectors", &gram_vectors, "operands"_a, "base"_a, "rows"_a, "columns"_a, "along"_a, "out"_a, no_gil);
  module.def("combine", &combine, "out"_a, "out_dtype"_a, "operands"_a, "coefficients"_a, "first"_a, "count"_a, no_gil);
  module.def("combine_vectors", &combine_vectors, "out"_a, "out_dtype"_a, "operands"_a, "coefficients"_a, "first"_a,
             "count"_a, "columns"_a, "along"_a, no_gil);
  module.def("nearswap", &nearswap, "out"_a, "out_dtype"_a, "a"_a, "b"_a, "t"_a, "first"_a, "count"_a, no_gil);
  module.def("copy", &copy, "out"_a, "source"_a, "bytes"_a, no_gil);
  module.def("count_nonfinite", &arcmerge::count_nonfinite, "operand"_a, "first"_a, "count"_a, no_gil);
  module.def("column_sums", &column_sums, "operand"_a, "rows"_a, "columns"_a, "out"_a, no_gil);
  module.def("variants", &arcmerge::variants);
  module.def("variant", &arcmerge::variant);
  module.def("use_variant", &arcmerge::use_variant, "name"_a);

  if (const char* forced = std::getenv("ARCMERGE_CPU")) arcmerge::use_variant(forced);
}
