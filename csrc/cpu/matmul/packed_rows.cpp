// Panels: products in f32 of many rows of x with rows of weights that are widened as they come.
//
// x lies as [block of steps][panel][step][row]: what is used together follows each other, as panels of many steps would
// lie a power of two from one another and push each other out of L2 (9,216 steps: 122 GFLOP/s of 160).
// Steps go in blocks, of which a panel takes 24 KB (L1) and the widened rows, used by every panel, 74 KB (L2). Against
// 48 columns a panel, 96 rows and 256 steps: 1.3 times as fast, as lines of one panel follow each other.
#include "cpu/matmul/packed_rows.h"

#include <algorithm>
#include <iterator>

#include "cpu/matmul/gemm.h"
#include "cpu/simd/tile.h"
#include "cpu/system/thread_pool.h"

namespace arcmerge {
namespace {

constexpr std::int64_t kSteps = 384;
// Panels of so many bytes stay in L3, and the allocator keeps their memory from one call to the next.
constexpr std::int64_t kMostBytes = 8 << 20, kMostCount = 768;

// Factors of sums that go on.
constexpr float kOnes[] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
static_assert(std::size(kOnes) == Panels::kWidth && Panels::kWidth % kLanes == 0, "products take whole columns");

}  // namespace

std::int64_t Panels::most(std::int64_t length) {
  const std::int64_t panels = kMostBytes / (std::max<std::int64_t>(length, 1) * kWidth * 4);
  return std::clamp(panels * kWidth, kWidth, kMostCount);
}

Panels::Panels(const char* x, std::int64_t count, std::int64_t length, DType dtype)
    : length_(length),
      columns_((count + kWidth - 1) / kWidth * kWidth),
      dtype_(dtype),
      lines_(new Line[columns_ / kWidth * length]) {
  parallel(columns_, kWidth, [&](std::int64_t column, std::int64_t end) {
    alignas(64) float rows[kWidth * kSteps];
    for (; column < end; column += kWidth) {
      const std::int64_t some = std::min(kWidth, count - column);
      std::fill(rows + some * kSteps, std::end(rows), 0.0f);
      for (std::int64_t step = 0; step < length; step += kSteps) {
        const std::int64_t steps = std::min(kSteps, length - step);
        for (std::int64_t row = 0; row < some; ++row)
          widen({x, dtype}, (column + row) * length + step, steps, rows + row * kSteps);
        transpose(reinterpret_cast<std::uint32_t*>(piece(column, step, steps)), kWidth, rows, kSteps * 4, kWidth,
                  steps);
      }
    }
  });
}

void Panels::multiply(const char* weight, std::int64_t rows, float* sums) const {
  alignas(64) float widened[kRows * kSteps];
  if (length_ == 0) std::fill_n(sums, rows * columns_, 0.0f);
  for (std::int64_t step = 0; step < length_; step += kSteps) {
    const std::int64_t steps = std::min(kSteps, length_ - step);
    for (std::int64_t row = 0; row < rows; ++row)
      widen({weight, dtype_}, row * length_ + step, steps, widened + row * kSteps);
    for (std::int64_t column = 0; column < columns_; column += kWidth)
      products(sums + column * rows, {reinterpret_cast<const char*>(widened), kSteps * 4, 4}, rows, steps,
               reinterpret_cast<const std::uint32_t*>(piece(column, step, steps)), kWidth, step ? kOnes : nullptr,
               DType::f32);
  }
}

}  // namespace arcmerge
