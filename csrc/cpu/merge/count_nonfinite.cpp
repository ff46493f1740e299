// count_nonfinite: the number of elements that are infinite or NaN after the operand's cast.
#include <algorithm>

#include "cpu/simd/convert.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {
namespace {

template <class>
ARCMERGE_INLINE std::int64_t nonfinite_in_body(const float* tile, std::int64_t count) {
  std::int32_t nonfinite = 0;
  for (std::int64_t i = 0; i < count; ++i) nonfinite += is_nonfinite(bits_of(tile[i]));
  return nonfinite;
}

ARCMERGE_VARIANTS(std::int64_t, nonfinite_in, (const float* tile, std::int64_t count), (tile, count))

}  // namespace

std::int64_t count_nonfinite(const Operand& operand, std::int64_t first, std::int64_t count) {
  require_range(first, count);
  alignas(64) float tile[kTile];
  std::int64_t nonfinite = 0;
  for (std::int64_t done = 0; done < count; done += kTile) {
    const std::int64_t size = std::min(kTile, count - done);
    widen(operand, first + done, size, tile);
    nonfinite += nonfinite_in(tile, size);
  }
  return nonfinite;
}

}  // namespace arcmerge
