// Many rows of x, packed for products with rows of weights at the speed of arithmetic.
#pragma once

#include <cstdint>
#include <memory>

#include "merge.h"

namespace arcmerge {

class Panels {
 public:
  // Rows of x of a panel, and the most rows of a weight that are multiplied at once.
  static constexpr std::int64_t kWidth = 16;
  static constexpr std::int64_t kRows = 48;

  // x: [count, length] of bf16 or f32.
  Panels(const char* x, std::int64_t count, std::int64_t length, DType dtype);

  // The most rows of x whose panels memory is kept for between two calls (packed_rows.cpp).
  static std::int64_t most(std::int64_t length);

  // Rows of x, and of zeros that fill the last panel.
  std::int64_t columns() const { return columns_; }

  // The dot products of at most kRows rows of a weight with x, summed in f32 in the order in which their terms lie:
  // one panel of x after another, and in a panel sums[row][row of x].
  void multiply(const char* weight, std::int64_t rows, float* sums) const;

 private:
  struct alignas(64) Line {
    float lane[kWidth];
  };

  // The piece of `steps` steps from `step` on of the panel that begins with a column.
  float* piece(std::int64_t column, std::int64_t step, std::int64_t steps) const {
    return lines_[0].lane + step * columns_ + column * steps;
  }

  std::int64_t length_, columns_;
  DType dtype_;
  std::unique_ptr<Line[]> lines_;
};

}  // namespace arcmerge
