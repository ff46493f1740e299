// rmsnorm and rmsnorm_add_rmsnorm. They work row by row: a row fits in L1, so that memory is read and written once.
//
// The squares are summed in f64, in which those of f32 values are exact, in kLanes lanes. All other arithmetic is in
// f32, with plain products and sums. So all variants give the same bits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/simd/constants.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

// The rows for which waking a thread is worthwhile: 15 us for a 2.6B model.
constexpr std::int64_t kRows = 16;

template <class>
ARCMERGE_INLINE void add_squares_body(const float* x, std::int64_t count, double* lanes) {
  double sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += double(x[i + lane]) * double(x[i + lane]);
  for (; i < count; ++i) sums[i % kLanes] += double(x[i]) * double(x[i]);
  std::copy(sums, sums + kLanes, lanes);
}

template <class>
ARCMERGE_INLINE void multiply_body(float* out, const float* x, float scale, const float* gain, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = x[i] * scale * gain[i];
}

template <class>
ARCMERGE_INLINE void add_body(float* sum, const float* x, DType dtype, std::int64_t count) {
  if (dtype == DType::bf16)
    for (std::int64_t i = 0; i < count; ++i) sum[i] = from_bf16(to_bf16(sum[i] + from_bf16(to_bf16(x[i]))));
  else
    for (std::int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

template <class>
ARCMERGE_INLINE void add_one_body(float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] += 1.0f;
}

ARCMERGE_VARIANTS(void, add_squares, (const float* x, std::int64_t count, double* lanes), (x, count, lanes))
ARCMERGE_VARIANTS(void, multiply, (float* out, const float* x, float scale, const float* gain, std::int64_t count),
                  (out, x, scale, gain, count))
ARCMERGE_VARIANTS(void, add, (float* sum, const float* x, DType dtype, std::int64_t count), (sum, x, dtype, count))
ARCMERGE_VARIANTS(void, add_one, (float* x, std::int64_t count), (x, count))

// Reads a row of a tensor, whose rows are as long as `values`, in f32.
void read_row(const void* tensor, DType dtype, std::int64_t row, std::vector<float>& values) {
  const std::int64_t columns = std::int64_t(values.size());
  widen({static_cast<const char*>(tensor), dtype}, row * columns, columns, values.data());
}

void write_row(const std::vector<float>& values, void* tensor, DType dtype, std::int64_t row) {
  const std::int64_t columns = std::int64_t(values.size());
  narrow(values.data(), columns, dtype, static_cast<char*>(tensor) + row * columns * item_size(dtype));
}

// 1 + weight.
std::vector<float> gain_of(const void* weight, DType dtype, std::int64_t columns) {
  std::vector<float> gain(columns);
  read_row(weight, dtype, 0, gain);
  add_one(gain.data(), columns);
  return gain;
}

void normalize(std::vector<float>& out, const std::vector<float>& x, const std::vector<float>& gain, double eps) {
  double lanes[kLanes], squares = 0;
  const std::int64_t count = std::int64_t(x.size());
  add_squares(x.data(), count, lanes);
  for (const double lane : lanes) squares += lane;
  multiply(out.data(), x.data(), float(1 / std::sqrt(squares / double(count) + eps)), gain.data(), count);
}

}  // namespace

void rmsnorm(void* out, const void* x, DType x_dtype, const void* weight, DType dtype, std::int64_t rows,
             std::int64_t columns, double eps) {
  require_matrix(rows, columns);
  const std::vector<float> gain = gain_of(weight, dtype, columns);
  parallel(rows, kRows, [&](std::int64_t first, std::int64_t last) {
    std::vector<float> values(columns), normed(columns);
    for (std::int64_t row = first; row < last; ++row) {
      read_row(x, x_dtype, row, values);
      normalize(normed, values, gain, eps);
      write_row(normed, out, dtype, row);
    }
  });
}

void rmsnorm_add_rmsnorm(void* total, void* normed, const void* branch, const void* residual, DType residual_dtype,
                         const void* post_weight, const void* pre_weight, DType dtype, std::int64_t rows,
                         std::int64_t columns, double eps) {
  require_matrix(rows, columns);
  const std::vector<float> post = gain_of(post_weight, dtype, columns), pre = gain_of(pre_weight, dtype, columns);
  parallel(rows, kRows, [&](std::int64_t first, std::int64_t last) {
    std::vector<float> values(columns), sums(columns), scaled(columns);
    for (std::int64_t row = first; row < last; ++row) {
      read_row(branch, dtype, row, values);
      read_row(residual, residual_dtype, row, sums);
      normalize(scaled, values, post, eps);
      add(sums.data(), scaled.data(), residual_dtype, columns);
      write_row(sums, total, residual_dtype, row);
      normalize(scaled, sums, pre, eps);
      write_row(scaled, normed, dtype, row);
    }
  });
}

}  // namespace arcmerge
