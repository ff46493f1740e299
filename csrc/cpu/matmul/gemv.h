// The sums of all products with weights: what generation of text spends its time on.
#pragma once

#include <cstdint>

#include "merge.h"

namespace arcmerge {

// sums[row * count + t] = the dot product of row `row` of the weight with x[t], both `length` elements of dtype (bf16
// or f32) long. The bits of a sum depend on its own row and x[t] alone, neither on `rows` nor on `count`.
void dot_rows(const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t length,
              DType dtype, float* sums);

}  // namespace arcmerge
