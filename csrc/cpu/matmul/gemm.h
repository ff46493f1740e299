// Matrix products of many rows with many columns.
//
// Operands consist of words of 4 bytes, which hold one f32 or two bf16:
//
//     bit    31 .......... 16   15 .......... 0
//     bf16   element 2i + 1     element 2i
#pragma once

#include <cstdint>

#include "cpu/simd/constants.h"
#include "merge.h"

namespace arcmerge {

// The number of columns must be a multiple of kLanes. kColumns of them are multiplied at once.
constexpr std::int64_t kColumns = 48;

// The left operand: word (i, step) is at address + i * row_stride + step * step_stride, in bytes.
struct LeftOperand {
  const char* address;
  std::int64_t row_stride, step_stride;
};

// out[i][j] = sum over steps of left(i, step) * right[step][j]; with factors, out[i][j] * factors[j] is added to it.
// out: [rows][columns]. right: [steps][columns]. Products are summed in f32, in the order of the steps, for two bf16
// the odd element first, so that a sum depends on its own row and column alone.
void gemm(float* out, const LeftOperand& left, std::int64_t rows, std::int64_t steps, const std::uint32_t* right,
          std::int64_t columns, const float* factors, DType dtype);

}  // namespace arcmerge
