// The rotary embedding of one head.
#pragma once

#include <cstdint>

#include "merge.h"

namespace arcmerge {

// out[i] = x[i] cos[i] - x[half + i] sin[i] and out[half + i] = x[half + i] cos[i] + x[i] sin[i], for i < half = dim /
// 2; table: cos, then sin. A table of bf16, for x of bf16, has every product and sum rounded, one of f32 the result.
void rotate(void* out, const void* x, DType dtype, const void* table, DType table_dtype, std::int64_t dim);

}  // namespace arcmerge
