// The operations of gemma2.h for Python. The signatures are documented in python/arcmerge/_C.pyi.
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "gemma2.h"

namespace {

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

}  // namespace

void bind_gemma2(py::module_& module) {
  using namespace py::literals;
  const NoGil no_gil;

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
}
