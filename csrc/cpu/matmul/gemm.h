// Products of many rows with many columns, for attention and for the logits of many tokens.
//
// Operands are words of 4 bytes: one f32, or two bf16 of which the first is the low half.
#pragma once

#include <cstdint>

#include "merge.h"

namespace arcmerge {

// Columns come in multiples of kLanes; kColumns of them are multiplied at once.
constexpr std::int64_t kLanes = 16, kColumns = 48;

// Word (i, step) of the left operand lies `row` bytes times i and `step` bytes times step past `address`.
struct Words {
  const char* address;
  std::int64_t row, step;
};

// out[i * columns + j] = sum over step < steps of left(i, step) times right[step * columns + j], added to
// out[i * columns + j] * factors[j] if there are factors. Sums in f32, in the order of the steps, of two bf16 the odd
// one first: a sum depends on its own row and column alone.
void products(float* out, const Words& left, std::int64_t rows, std::int64_t steps, const std::uint32_t* right,
              std::int64_t columns, const float* factors, DType dtype);

// out[word * columns + i] = word `word` of row i; the rows of `words` words begin `stride` bytes from one another.
void transpose(std::uint32_t* out, std::int64_t columns, const void* source, std::int64_t stride, std::int64_t rows,
               std::int64_t words);

}  // namespace arcmerge
