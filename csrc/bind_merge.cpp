// The operations of merge.h for Python. The signatures are documented in python/arcmerge/_C.pyi.
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>

#include "bind.h"
#include "mapped_file.h"

using arcmerge::Operand;

namespace {

Operand make_operand(Address address, int dtype, int cast, Address rows, Count columns) {
  if (rows != 0 && columns < 1)
    throw std::invalid_argument("'columns' must be 1 or more with 'rows', got " + std::to_string(columns));
  Operand operand;
  operand.address = at<const char>(address);
  operand.dtype = dtype_of(dtype, "dtype");
  operand.casts = cast != -1;
  if (operand.casts) operand.cast = dtype_of(cast, "cast");
  operand.rows = at<const std::uint64_t>(rows);
  operand.columns = columns;
  return operand;
}

// Whether the vectors of dimension `dim` of a matrix are its rows.
bool are_rows(int dim) {
  if (dim != 0 && dim != 1)
    throw std::invalid_argument("'dim' must be 0 (columns) or 1 (rows), got " + std::to_string(dim));
  return dim == 1;
}

const Operand* pointer(const std::optional<Operand>& operand) { return operand ? &*operand : nullptr; }

std::vector<double> gram(const std::vector<Operand>& operands, const std::optional<Operand>& base, Count first,
                         Count count) {
  std::vector<double> out(operands.size() * operands.size());
  arcmerge::gram(operands, pointer(base), first, count, out.data());
  return out;
}

void gram_vectors(const std::vector<Operand>& operands, const std::optional<Operand>& base, Count rows, Count columns,
                  int dim, Address out) {
  const auto op = are_rows(dim) ? arcmerge::gram_of_rows : arcmerge::gram_of_columns;
  op(operands, pointer(base), rows, columns, at<double>(out));
}

Count combine(Address out, int out_dtype, const std::vector<Operand>& operands, const std::vector<double>& coefficients,
              Count first, Count count) {
  const std::vector<float> rounded(coefficients.begin(), coefficients.end());
  return arcmerge::combine(at<void>(out), dtype_of(out_dtype, "out_dtype"), operands, rounded, first, count);
}

Count combine_vectors(Address out, int out_dtype, const std::vector<Operand>& operands, Address coefficients,
                      Count first, Count count, Count columns, int dim) {
  const auto op = are_rows(dim) ? arcmerge::combine_rows : arcmerge::combine_columns;
  return op(at<void>(out), dtype_of(out_dtype, "out_dtype"), operands, at<const float>(coefficients), first, count,
            columns);
}

Count nearswap(Address out, int out_dtype, const Operand& a, const Operand& b, double t, Count first, Count count) {
  return arcmerge::nearswap(at<void>(out), dtype_of(out_dtype, "out_dtype"), a, b, float(t), first, count);
}

Count magmax(Address out, int out_dtype, const std::vector<Operand>& operands, const Operand& base, double factor,
             Count first, Count count) {
  return arcmerge::magmax(at<void>(out), dtype_of(out_dtype, "out_dtype"), operands, base, float(factor), first, count);
}

Count median(Address out, int out_dtype, const std::vector<Operand>& operands, Count first, Count count) {
  return arcmerge::median(at<void>(out), dtype_of(out_dtype, "out_dtype"), operands, first, count);
}

void copy(Address out, Address source, std::size_t bytes) { std::memcpy(at<void>(out), at<const void>(source), bytes); }

std::unique_ptr<arcmerge::MappedFile> map_file(int file, std::size_t size) {
  try {
    return std::make_unique<arcmerge::MappedFile>(file, size);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
}

void column_sums(const Operand& operand, Count rows, Count columns, Address out) {
  arcmerge::column_sums(operand, rows, columns, at<double>(out));
}

// ---- selections of merge.h

arcmerge::Selection make_selection(const std::vector<std::array<Count, 4>>& cuts, const std::vector<py::int_>& keys,
                                   std::vector<std::pair<double, double>> probabilities, Count columns, bool joint,
                                   bool rounded, Address row_scales, const std::vector<Address>& masks) {
  arcmerge::Selection selection;
  for (const auto& [upper, upper_rank, lower, lower_rank] : cuts)
    selection.cuts.push_back({upper, upper_rank, lower, lower_rank});
  for (const py::int_& key : keys) selection.keys.push_back(PyLong_AsUnsignedLongLongMask(key.ptr()));  // of any sign
  selection.probabilities = std::move(probabilities);
  selection.columns = columns;
  selection.joint = joint;
  selection.rounded = rounded;
  selection.row_scales = at<const float>(row_scales);
  for (const Address mask : masks) selection.masks.push_back(at<std::uint8_t>(mask));
  return selection;
}

arcmerge::Consensus make_consensus(const std::vector<std::array<double, 4>>& factors, int election,
                                   bool zero_is_negative, double floor, bool inverse) {
  if (election < 0 || election > 2)
    throw std::invalid_argument("'election' must be 0 (none), 1 (sum) or 2 (count), got " + std::to_string(election));
  arcmerge::Consensus consensus;
  for (const auto& [vote, value, share, alone] : factors)
    consensus.factors.push_back({float(vote), float(value), float(share), float(alone)});
  consensus.election = arcmerge::Election(election);
  consensus.zero_is_negative = zero_is_negative;
  consensus.floor = float(floor);
  consensus.inverse = inverse;
  return consensus;
}

void magnitude_histogram(Address out, const std::vector<Operand>& operands, const Operand& base,
                         const arcmerge::Selection& selection, Count first, Count count) {
  arcmerge::magnitude_histogram(at<Count>(out), operands, base, selection, first, count);
}

void magnitude_histogram_within(Address out, const std::vector<Operand>& operands, const Operand& base,
                                const arcmerge::Selection& selection, const std::vector<std::vector<Count>>& prefixes,
                                Count first, Count count) {
  arcmerge::magnitude_histogram_within(at<Count>(out), operands, base, selection, prefixes, first, count);
}

void l1_norms(Address out, const std::vector<Operand>& operands, const Operand& base,
              const arcmerge::Selection& selection, Count first, Count count) {
  arcmerge::l1_norms(at<Count>(out), operands, base, selection, first, count);
}

Count consensus_combine(Address out, int out_dtype, const std::vector<Operand>& operands, const Operand& base,
                        const arcmerge::Selection& selection, const arcmerge::Consensus& consensus,
                        const std::vector<arcmerge::EqualsBefore>& before, Count first, Count count) {
  return arcmerge::consensus_combine(at<void>(out), dtype_of(out_dtype, "out_dtype"), operands, base, selection,
                                     consensus, before, first, count);
}

std::tuple<std::vector<double>, std::vector<Count>, std::vector<Count>, Count> consensus_sums(
    const std::vector<Operand>& operands, const Operand& base, const arcmerge::Selection& selection,
    const arcmerge::Consensus& consensus, const std::vector<arcmerge::EqualsBefore>& before, Count first, Count count) {
  auto sums = arcmerge::consensus_sums(operands, base, selection, consensus, before, first, count);
  return {std::move(sums.squares), std::move(sums.alone), std::move(sums.shared), sums.balance};
}

void row_divergences(Address out, const Operand& x, const Operand& base, Count columns, Count first_row, Count rows) {
  arcmerge::row_divergences(at<float>(out), x, base, columns, first_row, rows);
}

}  // namespace

void bind_merge(py::module_& module) {
  using namespace py::literals;
  const NoGil no_gil;

  py::class_<Operand>(module, "Operand")
      .def(py::init(&make_operand), "address"_a, "dtype"_a, "cast"_a = -1, "rows"_a = 0, "columns"_a = 0);
  py::class_<arcmerge::MappedFile>(module, "MappedFile", py::buffer_protocol())
      .def(py::init(&map_file), "file"_a, "size"_a)
      .def_property_readonly("lost", &arcmerge::MappedFile::lost)
      .def("forget", &arcmerge::MappedFile::forget, "begin"_a, "end"_a)
      .def_buffer([](const arcmerge::MappedFile& self) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(self.address()), py::ssize_t(self.size()), true);
      });
  module.def("gram", &gram, "operands"_a, "base"_a, "first"_a, "count"_a, no_gil);
  module.def("gram_vectors", &gram_vectors, "operands"_a, "base"_a, "rows"_a, "columns"_a, "dim"_a, "out"_a, no_gil);
  module.def("combine", &combine, "out"_a, "out_dtype"_a, "operands"_a, "coefficients"_a, "first"_a, "count"_a, no_gil);
  module.def("combine_vectors", &combine_vectors, "out"_a, "out_dtype"_a, "operands"_a, "coefficients"_a, "first"_a,
             "count"_a, "columns"_a, "dim"_a, no_gil);
  module.def("nearswap", &nearswap, "out"_a, "out_dtype"_a, "a"_a, "b"_a, "t"_a, "first"_a, "count"_a, no_gil);
  module.def("magmax", &magmax, "out"_a, "out_dtype"_a, "operands"_a, "base"_a, "factor"_a, "first"_a, "count"_a,
             no_gil);
  module.def("median", &median, "out"_a, "out_dtype"_a, "operands"_a, "first"_a, "count"_a, no_gil);
  module.def("copy", &copy, "out"_a, "source"_a, "bytes"_a, no_gil);
  module.def("count_nonfinite", &arcmerge::count_nonfinite, "operand"_a, "first"_a, "count"_a, no_gil);
  module.def("column_sums", &column_sums, "operand"_a, "rows"_a, "columns"_a, "out"_a, no_gil);
  py::class_<arcmerge::Selection>(module, "Selection")
      .def(py::init(&make_selection), "cuts"_a, "keys"_a, "probabilities"_a, "columns"_a, "joint"_a = false,
           "rounded"_a = false, "row_scales"_a = 0, "masks"_a = std::vector<Address>());
  py::class_<arcmerge::Consensus>(module, "Consensus")
      .def(py::init(&make_consensus), "factors"_a, "election"_a = 0, "zero_is_negative"_a = false, "floor"_a = 0.0,
           "inverse"_a = false);
  module.def("magnitude_histogram", &magnitude_histogram, "out"_a, "operands"_a, "base"_a, "selection"_a, "first"_a,
             "count"_a, no_gil);
  module.def("magnitude_histogram_within", &magnitude_histogram_within, "out"_a, "operands"_a, "base"_a, "selection"_a,
             "prefixes"_a, "first"_a, "count"_a, no_gil);
  module.def("l1_norms", &l1_norms, "out"_a, "operands"_a, "base"_a, "selection"_a, "first"_a, "count"_a, no_gil);
  module.def("consensus_combine", &consensus_combine, "out"_a, "out_dtype"_a, "operands"_a, "base"_a, "selection"_a,
             "consensus"_a, "before"_a, "first"_a, "count"_a, no_gil);
  module.def("consensus_sums", &consensus_sums, "operands"_a, "base"_a, "selection"_a, "consensus"_a, "before"_a,
             "first"_a, "count"_a, no_gil);
  module.def("row_divergences", &row_divergences, "out"_a, "x"_a, "base"_a, "columns"_a, "first_row"_a, "rows"_a,
             no_gil);
}
