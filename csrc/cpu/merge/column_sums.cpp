// column_sums: the sum of every column of a matrix in f64, for the mean row of an embedding.
#include <algorithm>

#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {
namespace {

template <class>
ARCMERGE_INLINE void add_body(double* sums, const float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sums[i] += double(x[i]);
}

ARCMERGE_VARIANTS(void, add, (double* sums, const float* x, std::int64_t count), (sums, x, count))

}  // namespace

void column_sums(const Operand& operand, std::int64_t rows, std::int64_t columns, double* out) {
  require_matrix(rows, columns);
  alignas(64) float tile[kTile];
  std::fill(out, out + columns, 0.0);
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t left = 0; left < columns; left += kTile) {
      const std::int64_t width = std::min(kTile, columns - left);
      widen(operand, row * columns + left, width, tile);
      add(out + left, tile, width);
    }
}

}  // namespace arcmerge
