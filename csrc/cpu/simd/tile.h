// Tiles of f32 that fit in L1, for operations on operands of any dtype. They are widened from operands and rounded to
// outputs.
#pragma once

#include <cstdint>

#include "merge.h"

namespace arcmerge {

// The number of elements of a tile. Tiles of eight operands take 32 KiB.
constexpr std::int64_t kTile = 1024;

// tile[i] = element first + i of the operand, cast and widened to f32, for i < count.
void widen(const Operand& operand, std::int64_t first, std::int64_t count, float* tile);

// out[i] = tile[i] rounded to dtype. Returns the number of outputs that are not finite.
std::int64_t narrow(const float* tile, std::int64_t count, DType dtype, char* out);

// Whether a fast path can read the operand in place.
inline bool is_plain_bf16(const Operand& operand) {
  return operand.dtype == DType::bf16 && !operand.casts && operand.rows == nullptr;
}

// Each throws std::invalid_argument unless its arguments are valid.
void require_operands(const std::vector<Operand>& operands);
void require_range(std::int64_t first, std::int64_t count);
void require_matrix(std::int64_t rows, std::int64_t columns);

}  // namespace arcmerge
