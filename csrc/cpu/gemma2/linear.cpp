// linear and linear_geglu: a few rows of x at the speed of memory, row by row of weights that fit in no cache
// (gemv.cpp); many at that of arithmetic (packed_rows.cpp).
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/gemma2/geglu.h"
#include "cpu/matmul/gemm.h"
#include "cpu/matmul/gemv.h"
#include "cpu/matmul/packed_rows.h"
#include "cpu/simd/tile.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

// Rows of x for which a weight is read row by row: a panel, if they are many.
constexpr std::int64_t kFew = Panels::kWidth;
// The rows of gate and of up are read in turns of as many: 290 KB of 2.6B, so that the switch does not show.
constexpr std::int64_t kFewRows = 64, kMostRows = std::max(kFewRows, Panels::kRows);

void require_inputs(std::int64_t count, std::int64_t length, std::int64_t rows) {
  if (count < 0 || length < 0 || rows < 0)
    throw std::invalid_argument("'count', 'length' and 'rows' must not be negative, got " + std::to_string(count) +
                                ", " + std::to_string(length) + " and " + std::to_string(rows));
}

// Rows of x, ready for products.
class Inputs {
 public:
  Inputs(const char* x, std::int64_t count, std::int64_t length, DType dtype, bool few)
      : count(count), length(length), dtype(dtype), rows(few ? kFewRows : Panels::kRows), x_(x) {
    if (!few) panels_.emplace(x, count, length, dtype);
  }

  const std::int64_t count, length;
  const DType dtype;
  const std::int64_t rows;  // of a weight, at most, that are multiplied at once

  std::int64_t row_bytes() const { return length * item_size(dtype); }
  std::int64_t columns() const { return panels_ ? panels_->columns() : count; }

  // Sums as of Panels; those of a few rows of x are one panel.
  void multiply(const char* weight, std::int64_t number, float* sums) const {
    if (panels_)
      panels_->multiply(weight, number, sums);
    else
      dot_rows(weight, number, x_, count, length, dtype, sums);
  }

  // out[t * stride + row] = the sum of row `row` and x[t], rounded.
  void store(const float* sums, std::int64_t number, char* out, std::int64_t stride) const {
    float values[kFew * kMostRows];
    for (std::int64_t t = 0; t < count; t += kFew, sums += kFew * number) {
      const std::int64_t some = std::min(kFew, count - t), width = std::min(kFew, columns() - t);
      transpose(reinterpret_cast<std::uint32_t*>(values), number, sums, width * 4, number, some);
      for (std::int64_t i = 0; i < some; ++i)
        narrow(values + i * number, number, dtype, out + (t + i) * stride * item_size(dtype));
    }
  }

 private:
  const char* x_;
  std::optional<Panels> panels_;
};

// Rows [first, last) of one weight.
void linear_rows(const char* weight, std::int64_t first, std::int64_t last, const Inputs& in, char* out,
                 std::int64_t stride) {
  std::vector<float> sums(in.rows * in.columns());
  for (std::int64_t row = first; row < last; row += in.rows) {
    const std::int64_t rows = std::min(in.rows, last - row);
    in.multiply(weight + row * in.row_bytes(), rows, sums.data());
    in.store(sums.data(), rows, out + row * item_size(in.dtype), stride);
  }
}

void linear_geglu_rows(const char* gate, const char* up, std::int64_t first, std::int64_t last, const Inputs& in,
                       char* out, std::int64_t stride) {
  std::vector<float> gates(in.rows * in.columns()), ups(in.rows * in.columns());
  for (std::int64_t row = first; row < last; row += in.rows) {
    const std::int64_t rows = std::min(in.rows, last - row);
    in.multiply(gate + row * in.row_bytes(), rows, gates.data());
    in.multiply(up + row * in.row_bytes(), rows, ups.data());
    activate(gates.data(), ups.data(), rows * in.columns(), in.dtype, false);
    in.store(gates.data(), rows, out + row * item_size(in.dtype), stride);
  }
}

// Calls body with as many rows of x as are taken at once, and with where their outputs begin.
template <class Body>
void in_parts(void* out, const void* x, std::int64_t count, std::int64_t length, std::int64_t stride, DType dtype,
              const Body& body) {
  const bool few = count <= kFew;
  const std::int64_t most = few ? kFew : Panels::most(length);
  for (std::int64_t t = 0; t < count; t += most) {
    const Inputs in(static_cast<const char*>(x) + t * length * item_size(dtype), std::min(most, count - t), length,
                    dtype, few);
    body(in, static_cast<char*>(out) + t * stride * item_size(dtype));
  }
}

}  // namespace

void linear(void* out, const void* x, std::int64_t count, std::int64_t length, const std::vector<Matrix>& weights,
            DType dtype) {
  std::int64_t rows = 0;
  for (const Matrix& weight : weights) {
    require_inputs(count, length, weight.rows);
    rows += weight.rows;
  }
  in_parts(out, x, count, length, rows, dtype, [&](const Inputs& in, char* to) {
    parallel(rows, in.rows, [&](std::int64_t first, std::int64_t last) {
      std::int64_t before = 0;
      for (const Matrix& weight : weights) {
        linear_rows(weight.address, std::max<std::int64_t>(first - before, 0), std::min(last - before, weight.rows), in,
                    to + before * item_size(dtype), rows);
        before += weight.rows;
      }
    });
  });
}

void linear_geglu(void* out, const void* x, std::int64_t count, std::int64_t length, const void* gate, const void* up,
                  std::int64_t rows, DType dtype) {
  require_inputs(count, length, rows);
  in_parts(out, x, count, length, rows, dtype, [&](const Inputs& in, char* to) {
    parallel(rows, in.rows, [&](std::int64_t first, std::int64_t last) {
      linear_geglu_rows(static_cast<const char*>(gate), static_cast<const char*>(up), first, last, in, to, rows);
    });
  });
}

}  // namespace arcmerge
