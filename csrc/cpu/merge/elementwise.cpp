// nearswap, magmax and median: they work element by element and need no statistics.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/simd/convert.h"
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

// largest[i] becomes x[i] - base[i] if that is larger in magnitude, or NaN.
template <class>
ARCMERGE_INLINE void keep_larger_body(float* largest, const float* x, const float* base, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float difference = x[i] - base[i];
    const bool replaces = (std::fabs(difference) > std::fabs(largest[i])) | (difference != difference);
    largest[i] = replaces ? difference : largest[i];
  }
}

template <class>
ARCMERGE_INLINE void add_scaled_to_body(float* difference, const float* base, float factor, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) difference[i] = base[i] + factor * difference[i];
}

// Puts the smaller of two values first.
template <class>
ARCMERGE_INLINE void exchange_body(float* a, float* b, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float smaller = b[i] < a[i] ? b[i] : a[i], larger = b[i] < a[i] ? a[i] : b[i];
    a[i] = smaller;
    b[i] = larger;
  }
}

template <class>
ARCMERGE_INLINE void average_body(float* a, const float* b, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) a[i] = 0.5f * a[i] + 0.5f * b[i];
}

// sum[i] is 0 if all x[i] are finite, else NaN.
template <class>
ARCMERGE_INLINE void note_nonfinite_body(float* sum, const float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] += x[i] * 0.0f;
}

template <class>
ARCMERGE_INLINE void add_body(float* sum, const float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

ARCMERGE_VARIANTS(void, swap_near, (float* a, const float* b, float t, std::int64_t count), (a, b, t, count))
ARCMERGE_VARIANTS(void, keep_larger, (float* largest, const float* x, const float* base, std::int64_t count),
                  (largest, x, base, count))
ARCMERGE_VARIANTS(void, add_scaled_to, (float* difference, const float* base, float factor, std::int64_t count),
                  (difference, base, factor, count))
ARCMERGE_VARIANTS(void, exchange, (float* a, float* b, std::int64_t count), (a, b, count))
ARCMERGE_VARIANTS(void, average, (float* a, const float* b, std::int64_t count), (a, b, count))
ARCMERGE_VARIANTS(void, note_nonfinite, (float* sum, const float* x, std::int64_t count), (sum, x, count))
ARCMERGE_VARIANTS(void, add, (float* sum, const float* x, std::int64_t count), (sum, x, count))

// Calls work(first, size, tile) for each tile of a range, and writes the tile that it has filled.
template <class Work>
std::int64_t write_tiles(void* out, DType out_dtype, std::int64_t first, std::int64_t count, const Work& work) {
  require_range(first, count);
  alignas(64) float tile[kTile];
  std::int64_t nonfinite = 0;
  for (std::int64_t done = 0; done < count; done += kTile) {
    const std::int64_t size = std::min(kTile, count - done);
    work(first + done, size, tile);
    nonfinite += narrow(tile, size, out_dtype, static_cast<char*>(out) + done * item_size(out_dtype));
  }
  return nonfinite;
}

}  // namespace

std::int64_t nearswap(void* out, DType out_dtype, const Operand& a, const Operand& b, float t, std::int64_t first,
                      std::int64_t count) {
  alignas(64) float y[kTile];
  return write_tiles(out, out_dtype, first, count, [&](std::int64_t start, std::int64_t size, float* x) {
    widen(a, start, size, x);
    widen(b, start, size, y);
    swap_near(x, y, t, size);
  });
}

std::int64_t magmax(void* out, DType out_dtype, const std::vector<Operand>& operands, const Operand& base, float factor,
                    std::int64_t first, std::int64_t count) {
  require_operands(operands);
  alignas(64) float x[kTile], subtracted[kTile];
  return write_tiles(out, out_dtype, first, count, [&](std::int64_t start, std::int64_t size, float* largest) {
    widen(base, start, size, subtracted);
    std::fill(largest, largest + size, 0.0f);
    for (const Operand& operand : operands) {
      widen(operand, start, size, x);
      keep_larger(largest, x, subtracted, size);
    }
    add_scaled_to(largest, subtracted, factor, size);
  });
}

std::int64_t median(void* out, DType out_dtype, const std::vector<Operand>& operands, std::int64_t first,
                    std::int64_t count) {
  require_operands(operands);
  const std::size_t k = operands.size();
  std::vector<float> sorted(k * kTile);
  alignas(64) float sum[kTile];
  return write_tiles(out, out_dtype, first, count, [&](std::int64_t start, std::int64_t size, float* middle) {
    std::fill(sum, sum + size, 0.0f);
    for (std::size_t i = 0; i < k; ++i) {
      widen(operands[i], start, size, &sorted[i * kTile]);
      note_nonfinite(sum, &sorted[i * kTile], size);
    }
    // Every round brings the largest of the rest to its place.
    for (std::size_t last = k; last-- > 1;)
      for (std::size_t i = 0; i < last; ++i) exchange(&sorted[i * kTile], &sorted[(i + 1) * kTile], size);
    std::copy_n(&sorted[(k - 1) / 2 * kTile], size, middle);
    average(middle, &sorted[k / 2 * kTile], size);
    add(middle, sum, size);
  });
}

}  // namespace arcmerge
