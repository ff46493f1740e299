// linear and linear_geglu. With few rows of x they are bound by memory and read the weight row by row (gemv.cpp); with
// many they are bound by arithmetic (packed_rows.cpp).
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/gemma2/geglu.h"
#include "cpu/matmul/gemm.h"
#include "cpu/matmul/gemv.h"
#include "cpu/matmul/packed_rows.h"
#include "cpu/matmul/transpose.h"
#include "cpu/simd/tile.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

// Rows of x in a group of sums, which is a panel of packed rows or all rows of a gemv.
constexpr std::int64_t kGroup = PackedRows::kWidth;
static_assert(kMaxGemvRows <= kGroup, "the rows of a gemv are one group");
// The rows of gate and of up are read by turns, so many at a time: 290 KB of a 2.6B model, long compared with the
// switch.
constexpr std::int64_t kGemvRows = 64, kMaxRows = std::max(kGemvRows, PackedRows::kRows);

void require_sizes(std::int64_t count, std::int64_t length, std::int64_t rows) {
  if (count < 0 || length < 0 || rows < 0)
    throw std::invalid_argument("'count', 'length' and 'rows' must not be negative, got " + std::to_string(count) +
                                ", " + std::to_string(length) + " and " + std::to_string(rows));
}

// Rows of x, prepared for products.
class Inputs {
 public:
  Inputs(const char* x, std::int64_t count, std::int64_t length, DType dtype, bool use_gemv)
      : count(count), length(length), dtype(dtype), rows(use_gemv ? kGemvRows : PackedRows::kRows), x_(x) {
    if (!use_gemv) packed_.emplace(x, count, length, dtype);
  }

  const std::int64_t count, length;
  const DType dtype;
  const std::int64_t rows;  // the maximum number of rows of a weight in one product

  std::int64_t row_bytes() const { return length * item_size(dtype); }
  std::int64_t columns() const { return packed_ ? packed_->columns() : count; }

  // sums: [group of rows of x][row of the weight][row of x in the group].
  void multiply(const char* weight, std::int64_t weight_rows, float* sums) const {
    if (packed_)
      packed_->multiply(weight, weight_rows, sums);
    else
      gemv(weight, weight_rows, x_, count, length, dtype, sums);
  }

  // out[t * stride + row] = the sum of a row of the weight and x[t], rounded.
  void store(const float* sums, std::int64_t weight_rows, char* out, std::int64_t stride) const {
    float values[kGroup * kMaxRows];
    for (std::int64_t t = 0; t < count; t += kGroup, sums += kGroup * weight_rows) {
      const std::int64_t group = std::min(kGroup, count - t), width = std::min(kGroup, columns() - t);
      transpose(reinterpret_cast<std::uint32_t*>(values), weight_rows, sums, width * 4, weight_rows, group);
      for (std::int64_t i = 0; i < group; ++i)
        narrow(values + i * weight_rows, weight_rows, dtype, out + (t + i) * stride * item_size(dtype));
    }
  }

 private:
  const char* x_;
  std::optional<PackedRows> packed_;
};

// The products with rows [first, last) of one weight.
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

// Calls body with groups of rows of x that are multiplied together, and with the address of their outputs.
template <class Body>
void for_groups(void* out, const void* x, std::int64_t count, std::int64_t length, std::int64_t stride, DType dtype,
                const Body& body) {
  const bool use_gemv = count <= kMaxGemvRows;
  const std::int64_t max_count = use_gemv ? kMaxGemvRows : PackedRows::max_count(length);
  for (std::int64_t t = 0; t < count; t += max_count) {
    const Inputs in(static_cast<const char*>(x) + t * length * item_size(dtype), std::min(max_count, count - t), length,
                    dtype, use_gemv);
    body(in, static_cast<char*>(out) + t * stride * item_size(dtype));
  }
}

}  // namespace

void linear(void* out, const void* x, std::int64_t count, std::int64_t length, const std::vector<Matrix>& weights,
            DType dtype) {
  std::int64_t rows = 0;
  for (const Matrix& weight : weights) {
    require_sizes(count, length, weight.rows);
    rows += weight.rows;
  }
  for_groups(out, x, count, length, rows, dtype, [&](const Inputs& in, char* group_out) {
    parallel(rows, in.rows, [&](std::int64_t first, std::int64_t last) {
      std::int64_t before = 0;
      for (const Matrix& weight : weights) {
        linear_rows(weight.address, std::max<std::int64_t>(first - before, 0), std::min(last - before, weight.rows), in,
                    group_out + before * item_size(dtype), rows);
        before += weight.rows;
      }
    });
  });
}

void linear_geglu(void* out, const void* x, std::int64_t count, std::int64_t length, const void* gate, const void* up,
                  std::int64_t rows, DType dtype) {
  require_sizes(count, length, rows);
  for_groups(out, x, count, length, rows, dtype, [&](const Inputs& in, char* group_out) {
    parallel(rows, in.rows, [&](std::int64_t first, std::int64_t last) {
      linear_geglu_rows(static_cast<const char*>(gate), static_cast<const char*>(up), first, last, in, group_out, rows);
    });
  });
}

}  // namespace arcmerge
