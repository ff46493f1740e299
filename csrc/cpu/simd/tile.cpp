#include "cpu/simd/tile.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/simd/convert.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

// Types of the elements of mapped checkpoints, which may be unaligned.
template <typename T>
struct Unaligned {
  typedef T type __attribute__((aligned(1), may_alias));
};
using Bits16 = Unaligned<std::uint16_t>::type;
using Float32 = Unaligned<float>::type;

template <class>
ARCMERGE_INLINE void widen_span_body(const char* source, DType dtype, std::int64_t count, float* tile) {
  const Bits16* halves = reinterpret_cast<const Bits16*>(source);
  const Float32* floats = reinterpret_cast<const Float32*>(source);
  switch (dtype) {
    case DType::bf16:
      for (std::int64_t i = 0; i < count; ++i) tile[i] = from_bf16(halves[i]);
      break;
    case DType::f16:
      for (std::int64_t i = 0; i < count; ++i) tile[i] = from_f16(halves[i]);
      break;
    case DType::f32:
      for (std::int64_t i = 0; i < count; ++i) tile[i] = floats[i];
      break;
  }
}

template <class>
ARCMERGE_INLINE void cast_tile_body(DType dtype, std::int64_t count, float* tile) {
  if (dtype == DType::bf16)
    for (std::int64_t i = 0; i < count; ++i) tile[i] = from_bf16(to_bf16(tile[i]));
  else if (dtype == DType::f16)
    for (std::int64_t i = 0; i < count; ++i) tile[i] = from_f16(to_f16(tile[i]));
}

template <class>
ARCMERGE_INLINE std::int64_t narrow_body(const float* tile, std::int64_t count, DType dtype, char* out) {
  Bits16* halves = reinterpret_cast<Bits16*>(out);
  Float32* floats = reinterpret_cast<Float32*>(out);
  std::int32_t nonfinite = 0;
  switch (dtype) {
    case DType::bf16:
      for (std::int64_t i = 0; i < count; ++i) {
        const std::uint16_t bits = to_bf16(tile[i]);
        halves[i] = bits;
        nonfinite += (bits & 0x7f80) == 0x7f80;
      }
      break;
    case DType::f16:
      for (std::int64_t i = 0; i < count; ++i) {
        const std::uint16_t bits = to_f16(tile[i]);
        halves[i] = bits;
        nonfinite += (bits & 0x7c00) == 0x7c00;
      }
      break;
    case DType::f32:
      for (std::int64_t i = 0; i < count; ++i) {
        floats[i] = canonical(tile[i]);
        nonfinite += is_nonfinite(bits_of(tile[i]));
      }
      break;
  }
  return nonfinite;
}

ARCMERGE_VARIANTS(void, widen_span, (const char* source, DType dtype, std::int64_t count, float* tile),
                  (source, dtype, count, tile))
ARCMERGE_VARIANTS(void, cast_tile, (DType dtype, std::int64_t count, float* tile), (dtype, count, tile))

}  // namespace

ARCMERGE_VARIANTS(std::int64_t, narrow, (const float* tile, std::int64_t count, DType dtype, char* out),
                  (tile, count, dtype, out))

void widen(const Operand& operand, std::int64_t first, std::int64_t count, float* tile) {
  const std::int64_t size = item_size(operand.dtype);
  if (operand.rows == nullptr) {
    widen_span(operand.address + first * size, operand.dtype, count, tile);
  } else {
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t row = (first + done) / operand.columns, column = (first + done) % operand.columns;
      const std::int64_t span = std::min(count - done, operand.columns - column);
      const char* source = reinterpret_cast<const char*>(operand.rows[row]) + column * size;
      widen_span(source, operand.dtype, span, tile + done);
      done += span;
    }
  }
  if (operand.casts && operand.cast != operand.dtype) cast_tile(operand.cast, count, tile);
}

void require_operands(const std::vector<Operand>& operands) {
  if (operands.empty()) throw std::invalid_argument("'operands' must have 1 or more entries, got 0");
}

void require_range(std::int64_t first, std::int64_t count) {
  if (first < 0 || count < 0)
    throw std::invalid_argument("'first' and 'count' must not be negative, got " + std::to_string(first) + " and " +
                                std::to_string(count));
}

void require_matrix(std::int64_t rows, std::int64_t columns) {
  if (rows < 0 || columns < 1)
    throw std::invalid_argument("'rows' must be 0 or more and 'columns' 1 or more, got " + std::to_string(rows) +
                                " and " + std::to_string(columns));
}

}  // namespace arcmerge
