// nearswap: moves a toward b where the two are close. It works element by element and needs no Gram matrix.
#include <algorithm>
#include <cmath>

#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {
namespace {

template <class>
ARCMERGE_INLINE void swap_near_body(float* a, const float* b, float t, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float distance = std::fabs(b[i] - a[i]);
    const float ratio = t / (distance > 1e-6f ? distance : 1e-6f);
    const float above = ratio > 0.0f ? ratio : 0.0f;
    const float weight = above < 1.0f ? above : 1.0f;
    a[i] = weight * b[i] + (1.0f - weight) * a[i];
  }
}

ARCMERGE_VARIANTS(void, swap_near, (float* a, const float* b, float t, std::int64_t count), (a, b, t, count))

}  // namespace

std::int64_t nearswap(void* out, DType out_dtype, const Operand& a, const Operand& b, float t, std::int64_t first,
                      std::int64_t count) {
  require_range(first, count);
  alignas(64) float x[kTile], y[kTile];
  std::int64_t nonfinite = 0;
  for (std::int64_t done = 0; done < count; done += kTile) {
    const std::int64_t size = std::min(kTile, count - done);
    widen(a, first + done, size, x);
    widen(b, first + done, size, y);
    swap_near(x, y, t, size);
    nonfinite += narrow(x, size, out_dtype, static_cast<char*>(out) + done * item_size(out_dtype));
  }
  return nonfinite;
}

}  // namespace arcmerge
