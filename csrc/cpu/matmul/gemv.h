// Products of a weight with few rows of x, at the speed of memory. Text generation spends most of its time here.
#pragma once

#include <cstdint>

#include "merge.h"

namespace arcmerge {

// gemv is faster than packed rows or gemm for up to so many rows of x.
constexpr std::int64_t kMaxGemvRows = 16;

// sums[row][t] = the dot product of a row of the weight with x[t], both of `length` elements of dtype bf16 or f32.
// weight: [rows, length]. x: [count, length]. sums: [rows][count]. A sum depends on its row and x[t] alone, neither on
// `rows` nor on `count`.
void gemv(const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t length, DType dtype,
          float* sums);

}  // namespace arcmerge
