// arcmerge._C: the operations of merge.h and gemma2.h for Python, with addresses as integers. No other file knows
// Python. The signatures are documented in python/arcmerge/_C.pyi. Every operation runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>

#include "gemma2.h"
#include "mapped_file.h"
#include "merge.h"

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
                                   bool rounded, Address row_scales) {
  arcmerge::Selection selection;
  for (const auto& [upper, upper_rank, lower, lower_rank] : cuts)
    selection.cuts.push_back({upper, upper_rank, lower, lower_rank});
  for (const py::int_& key : keys) selection.keys.push_back(PyLong_AsUnsignedLongLongMask(key.ptr()));  // of any sign
  selection.probabilities = std::move(probabilities);
  selection.columns = columns;
  selection.joint = joint;
  selection.rounded = rounded;
  selection.row_scales = at<const float>(row_scales);
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

// ---- gemma2.h

// Calls of operations that can be repeated without Python.
struct Recording {
  std::vector<std::string> names;
  std::vector<std::function<void()>> calls;

  void replay() const {
    for (const auto& call : calls) call();
  }
};

thread_local Recording* recording = nullptr;  // the recording to which calls of this thread are added

// Wraps an operation so that its calls are added to the current recording.
template <class... Arguments>
auto recorded(const char* name, void (*operation)(Arguments...)) {
  return [name, operation](Arguments... arguments) {
    operation(arguments...);
    if (!recording) return;
    recording->names.push_back(name);
    recording->calls.push_back([operation, arguments...] { operation(arguments...); });
  };
}

DType activation_of(int code, const char* name) {
  if (code != int(DType::bf16) && code != int(DType::f32))
    throw std::invalid_argument(std::string("'") + name + "' must be 0 (bf16) or 2 (f32), got " + std::to_string(code));
  return DType(code);
}

void linear(Address out, Address x, Count count, Count length, const std::vector<std::pair<Address, Count>>& weights,
            int dtype) {
  std::vector<arcmerge::Matrix> matrices;
  for (const auto& [address, rows] : weights) matrices.push_back({at<const char>(address), rows});
  arcmerge::linear(at<void>(out), at<const void>(x), count, length, matrices, activation_of(dtype, "dtype"));
}

void linear_geglu(Address out, Address x, Count count, Count length, Address gate, Address up, Count rows, int dtype) {
  arcmerge::linear_geglu(at<void>(out), at<const void>(x), count, length, at<const void>(gate), at<const void>(up),
                         rows, activation_of(dtype, "dtype"));
}

void geglu(Address out, Address gate, Count gate_stride, Address up, Count up_stride, Count rows, Count columns,
           int dtype, bool stepwise) {
  arcmerge::geglu(at<void>(out), at<const void>(gate), gate_stride, at<const void>(up), up_stride, rows, columns,
                  activation_of(dtype, "dtype"), stepwise);
}

void rmsnorm(Address out, Address x, int x_dtype, Address weight, int dtype, Count rows, Count columns, double eps) {
  arcmerge::rmsnorm(at<void>(out), at<const void>(x), activation_of(x_dtype, "x_dtype"), at<const void>(weight),
                    activation_of(dtype, "dtype"), rows, columns, eps);
}

void rmsnorm_add_rmsnorm(Address total, Address normed, Address branch, Address residual, int residual_dtype,
                         Address post_weight, Address pre_weight, int dtype, Count rows, Count columns, double eps) {
  arcmerge::rmsnorm_add_rmsnorm(at<void>(total), at<void>(normed), at<const void>(branch), at<const void>(residual),
                                activation_of(residual_dtype, "residual_dtype"), at<const void>(post_weight),
                                at<const void>(pre_weight), activation_of(dtype, "dtype"), rows, columns, eps);
}

arcmerge::KvCache make_kv_cache(Address key, Address value, Count sequences, Count heads, Count slots, Count head_dim,
                                int dtype) {
  return {at<char>(key), at<char>(value), sequences, heads, slots, head_dim, activation_of(dtype, "dtype")};
}

using AddressAndStride = std::pair<Address, Count>;

void rope_cache(Address out, AddressAndStride query, Count heads, AddressAndStride key, AddressAndStride value,
                Count count, Address table, int table_dtype, Address positions, Address sequences,
                const arcmerge::KvCache& cache) {
  const auto rows = [](const AddressAndStride& pair) {
    return arcmerge::Rows{at<const char>(pair.first), pair.second};
  };
  arcmerge::rope_cache(at<void>(out), rows(query), heads, rows(key), rows(value), count, at<const void>(table),
                       activation_of(table_dtype, "table_dtype"), at<const Count>(positions),
                       at<const Count>(sequences), cache);
}

void attention(Address out, Address query, Count heads, const arcmerge::KvCache& cache, Address query_start,
               Address lengths, double scale, double softcap, Count window) {
  arcmerge::attention(at<void>(out), at<const void>(query), heads, cache, at<const std::int32_t>(query_start),
                      at<const std::int32_t>(lengths), scale, softcap, window);
}

void attention_decode(Address out, Address qkv, Count heads, Address table, int table_dtype, Address lengths,
                      const arcmerge::KvCache& cache, double scale, double softcap, Count window) {
  arcmerge::attention_decode(at<void>(out), at<const void>(qkv), heads, at<const void>(table),
                             activation_of(table_dtype, "table_dtype"), at<const std::int32_t>(lengths), cache, scale,
                             softcap, window);
}

arcmerge::LmHead make_lm_head(Address x, Address weight, Count count, Count ids, Count length, int dtype,
                              double softcap) {
  return {at<const char>(x), at<const char>(weight), count, ids, length, activation_of(dtype, "dtype"), float(softcap)};
}

void lm_head_logprob(Address out, Address best, const arcmerge::LmHead& head, Address ids) {
  arcmerge::lm_head_logprob(at<float>(out), at<Count>(best), head, at<const Count>(ids));
}

void lm_head_scores(Address out, Address maxima, const arcmerge::LmHead& head, Address seen, double penalty,
                    double temperature) {
  arcmerge::lm_head_scores(at<float>(out), at<float>(maxima), head,
                           {at<const std::uint32_t>(seen), float(penalty), float(temperature)});
}

void lm_head_draw(Address out, Address scores, Count count, Count ids, std::uint64_t seed, Address steps) {
  arcmerge::lm_head_draw(at<Count>(out), at<const float>(scores), count, ids, seed, at<const Count>(steps));
}

// ---- the shutdown of the interpreter

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
  const py::call_guard<py::gil_scoped_release> no_gil;

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
           "rounded"_a = false, "row_scales"_a = 0);
  py::class_<arcmerge::Consensus>(module, "Consensus")
      .def(py::init(&make_consensus), "factors"_a, "election"_a = 0, "zero_is_negative"_a = false, "floor"_a = 0.0,
           "inverse"_a = false);
  module.def("magnitude_histogram", &magnitude_histogram, "out"_a, "operands"_a, "base"_a, "selection"_a, "first"_a,
             "count"_a, no_gil);
  module.def("magnitude_histogram_within", &magnitude_histogram_within, "out"_a, "operands"_a, "base"_a, "selection"_a,
             "prefixes"_a, "first"_a, "count"_a, no_gil);
  module.def("consensus_combine", &consensus_combine, "out"_a, "out_dtype"_a, "operands"_a, "base"_a, "selection"_a,
             "consensus"_a, "before"_a, "first"_a, "count"_a, no_gil);
  module.def("consensus_sums", &consensus_sums, "operands"_a, "base"_a, "selection"_a, "consensus"_a, "before"_a,
             "first"_a, "count"_a, no_gil);
  module.def("row_divergences", &row_divergences, "out"_a, "x"_a, "base"_a, "columns"_a, "first_row"_a, "rows"_a,
             no_gil);
  module.def("variants", &arcmerge::variants);
  module.def("variant", &arcmerge::variant);
  module.def("use_variant", &arcmerge::use_variant, "name"_a);

  module.attr("MAX_THREADS") = arcmerge::kMaxThreads;
  module.def("threads", &arcmerge::threads);
  module.def("quota_threads", &arcmerge::quota_threads, "root"_a = "");
  module.def("set_threads", &arcmerge::set_threads, "threads"_a, no_gil);
  module.def(
      "read",
      [](std::uintptr_t address, std::int64_t count) { arcmerge::read(reinterpret_cast<const void*>(address), count); },
      "address"_a, "count"_a, no_gil);
  py::class_<Recording>(module, "Recording")
      .def(py::init())
      .def_readonly("names", &Recording::names)
      .def("begin", [](Recording& self) { recording = &self; })
      .def("end", [](Recording&) { recording = nullptr; })
      .def("replay", &Recording::replay, no_gil);
  module.def("linear", recorded("linear", &linear), "out"_a, "x"_a, "count"_a, "length"_a, "weights"_a, "dtype"_a,
             no_gil);
  module.def("linear_geglu", recorded("linear_geglu", &linear_geglu), "out"_a, "x"_a, "count"_a, "length"_a, "gate"_a,
             "up"_a, "rows"_a, "dtype"_a, no_gil);
  module.def("geglu", recorded("geglu", &geglu), "out"_a, "gate"_a, "gate_stride"_a, "up"_a, "up_stride"_a, "rows"_a,
             "columns"_a, "dtype"_a, "stepwise"_a, no_gil);
  module.def("rmsnorm", recorded("rmsnorm", &rmsnorm), "out"_a, "x"_a, "x_dtype"_a, "weight"_a, "dtype"_a, "rows"_a,
             "columns"_a, "eps"_a, no_gil);
  module.def("rmsnorm_add_rmsnorm", recorded("rmsnorm_add_rmsnorm", &rmsnorm_add_rmsnorm), "total"_a, "normed"_a,
             "branch"_a, "residual"_a, "residual_dtype"_a, "post_weight"_a, "pre_weight"_a, "dtype"_a, "rows"_a,
             "columns"_a, "eps"_a, no_gil);

  py::class_<arcmerge::KvCache>(module, "KvCache")
      .def(py::init(&make_kv_cache), "key"_a, "value"_a, "sequences"_a, "heads"_a, "slots"_a, "head_dim"_a, "dtype"_a);
  module.def("rope_cache", recorded("rope_cache", &rope_cache), "out"_a, "query"_a, "heads"_a, "key"_a, "value"_a,
             "count"_a, "table"_a, "table_dtype"_a, "positions"_a, "sequences"_a, "cache"_a, no_gil);
  module.def("attention", recorded("attention", &attention), "out"_a, "query"_a, "heads"_a, "cache"_a, "query_start"_a,
             "lengths"_a, "scale"_a, "softcap"_a, "window"_a, no_gil);
  module.def("attention_decode", recorded("attention_decode", &attention_decode), "out"_a, "qkv"_a, "heads"_a,
             "table"_a, "table_dtype"_a, "lengths"_a, "cache"_a, "scale"_a, "softcap"_a, "window"_a, no_gil);

  module.attr("LM_HEAD_TILE") = arcmerge::kLmHeadTile;
  py::class_<arcmerge::LmHead>(module, "LmHead")
      .def(py::init(&make_lm_head), "x"_a, "weight"_a, "count"_a, "ids"_a, "length"_a, "dtype"_a, "softcap"_a);
  module.def("lm_head_logprob", &lm_head_logprob, "out"_a, "best"_a, "head"_a, "ids"_a, no_gil);
  module.def("lm_head_scores", &lm_head_scores, "out"_a, "maxima"_a, "head"_a, "seen"_a, "penalty"_a, "temperature"_a,
             no_gil);
  module.def("lm_head_draw", &lm_head_draw, "out"_a, "scores"_a, "count"_a, "ids"_a, "seed"_a, "steps"_a, no_gil);

  if (const char* forced = std::getenv("ARCMERGE_CPU")) arcmerge::use_variant(forced);
}
