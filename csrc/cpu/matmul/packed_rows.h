// Many rows of x, packed for products with the rows of weights that are bound by arithmetic, not by memory.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/simd/constants.h"
#include "merge.h"

namespace arcmerge {

class PackedRows {
 public:
  // The number of rows of x in a panel, and the maximum number of rows of a weight in one product.
  static constexpr std::int64_t kWidth = kLanes;
  static constexpr std::int64_t kRows = 48;

  // x: [count, length] of bf16 or f32.
  PackedRows(const char* x, std::int64_t count, std::int64_t length, DType dtype);

  // The maximum number of rows of x to pack at once, so that their memory is reused (packed_rows.cpp).
  static std::int64_t max_count(std::int64_t length);

  // The number of rows of x, rounded up to whole panels.
  std::int64_t columns() const { return columns_; }

  // The dot products of at most kRows rows of a weight with all rows of x, summed in f32 in the order of the elements.
  // sums: [panel][row of the weight][row of x in the panel].
  void multiply(const char* weight, std::int64_t rows, float* sums) const;

 private:
  struct alignas(64) Line {
    float lane[kWidth];
  };

  // The block of steps [step, step + steps) of the panel that starts with row `column` of x.
  float* block(std::int64_t column, std::int64_t step, std::int64_t steps) const {
    return lines_[0].lane + step * columns_ + column * steps;
  }

  std::int64_t length_, columns_;
  DType dtype_;
  std::unique_ptr<Line[]> lines_;
};

}  // namespace arcmerge
