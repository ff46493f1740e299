// linear and linear_geglu: a few rows of x by weights that do not fit in any cache, each of which is read once.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/dot.h"
#include "cpu/geglu.h"
#include "cpu/pool.h"
#include "cpu/tile.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

// Rows of x that a weight is read for once; more begin anew.
constexpr std::int64_t kMostCount = 16;
// The rows of gate and of up are read in turns of as many: 290 KB of 2.6B, so that the switch does not show.
constexpr std::int64_t kRows = 64;

struct Inputs {
  const char* x;
  std::int64_t count, length;
  DType dtype;

  std::int64_t row_bytes() const { return length * item_size(dtype); }
};

void require_inputs(std::int64_t count, std::int64_t length, std::int64_t rows) {
  if (count < 0 || length < 0 || rows < 0)
    throw std::invalid_argument("'count', 'length' and 'rows' must not be negative, got " + std::to_string(count) +
                                ", " + std::to_string(length) + " and " + std::to_string(rows));
}

// out[t * stride + row] = sums[row * count + t], rounded.
void store(const float* sums, std::int64_t rows, std::int64_t count, DType dtype, char* out, std::int64_t stride) {
  float values[kRows];
  for (std::int64_t t = 0; t < count; ++t) {
    for (std::int64_t row = 0; row < rows; ++row) values[row] = sums[row * count + t];
    narrow(values, rows, dtype, out + t * stride * item_size(dtype));
  }
}

// Rows [first, last) of one weight.
void linear_rows(const char* weight, std::int64_t first, std::int64_t last, const Inputs& in, char* out,
                 std::int64_t stride) {
  float sums[kRows * kMostCount];
  for (std::int64_t row = first; row < last; row += kRows) {
    const std::int64_t rows = std::min(kRows, last - row);
    dot_rows(weight + row * in.row_bytes(), rows, in.x, in.count, in.length, in.dtype, sums);
    store(sums, rows, in.count, in.dtype, out + row * item_size(in.dtype), stride);
  }
}

void linear_geglu_rows(const char* gate, const char* up, std::int64_t first, std::int64_t last, const Inputs& in,
                       bool stepwise, char* out, std::int64_t stride) {
  float gates[kRows * kMostCount], ups[kRows * kMostCount];
  for (std::int64_t row = first; row < last; row += kRows) {
    const std::int64_t rows = std::min(kRows, last - row);
    dot_rows(gate + row * in.row_bytes(), rows, in.x, in.count, in.length, in.dtype, gates);
    dot_rows(up + row * in.row_bytes(), rows, in.x, in.count, in.length, in.dtype, ups);
    activate(gates, ups, rows * in.count, in.dtype, stepwise);
    store(gates, rows, in.count, in.dtype, out + row * item_size(in.dtype), stride);
  }
}

// Calls body with at most kMostCount rows of x at a time, and with where their outputs begin.
template <class Body>
void in_parts(void* out, const void* x, std::int64_t count, std::int64_t length, std::int64_t stride, DType dtype,
              const Body& body) {
  for (std::int64_t t = 0; t < count; t += kMostCount) {
    const Inputs in{static_cast<const char*>(x) + t * length * item_size(dtype), std::min(kMostCount, count - t),
                    length, dtype};
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
    parallel(rows, kRows, [&](std::int64_t first, std::int64_t last) {
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
                  std::int64_t rows, DType dtype, bool stepwise) {
  require_inputs(count, length, rows);
  in_parts(out, x, count, length, rows, dtype, [&](const Inputs& in, char* to) {
    parallel(rows, kRows, [&](std::int64_t first, std::int64_t last) {
      linear_geglu_rows(static_cast<const char*>(gate), static_cast<const char*>(up), first, last, in, stepwise, to,
                        rows);
    });
  });
}

}  // namespace arcmerge
