// PackedRows: products in f32 of many rows of x with rows of a weight, which are widened to f32 as they are read.
//
// x is packed as [block of steps][panel][step][row], where a step is one element of every row:
//
//     block 0 (steps 0 .. 383)                  block 1 (steps 384 .. 767)                ...
//     panel 0 (rows 0 .. 15)  panel 1    ...    panel 0 (rows 0 .. 15)  panel 1    ...    ...
//     step 0: 16 values, step 1: 16 values, ...
//
// Values that are used together are adjacent. Whole panels of many steps would start at distances near a power of two
// and evict each other from L2: with 9,216 steps they reach 122 GFLOP/s instead of 160. In a block, a panel takes 24 KB
// (L1), and the widened rows of the weight, which every panel uses, 74 KB (L2). This is 1.3 times as fast as panels of
// 48 rows, 96 rows of a weight and 256 steps.
#include "cpu/matmul/packed_rows.h"

#include <algorithm>
#include <iterator>

#include "cpu/matmul/gemm.h"
#include "cpu/matmul/transpose.h"
#include "cpu/simd/tile.h"
#include "cpu/system/thread_pool.h"

namespace arcmerge {
namespace {

constexpr std::int64_t kSteps = 384;
// Packed rows of so many bytes stay in L3, and the allocator reuses their memory in the next call.
constexpr std::int64_t kMaxBytes = 8 << 20, kMaxCount = 768;

// The factors with which gemm continues sums.
constexpr float kOnes[] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
static_assert(std::size(kOnes) == PackedRows::kWidth && PackedRows::kWidth % kLanes == 0,
              "gemm takes whole units of columns");

}  // namespace

std::int64_t PackedRows::max_count(std::int64_t length) {
  const std::int64_t panels = kMaxBytes / (std::max<std::int64_t>(length, 1) * kWidth * 4);
  return std::clamp(panels * kWidth, kWidth, kMaxCount);
}

PackedRows::PackedRows(const char* x, std::int64_t count, std::int64_t length, DType dtype)
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
        transpose(reinterpret_cast<std::uint32_t*>(block(column, step, steps)), kWidth, rows, kSteps * 4, kWidth,
                  steps);
      }
    }
  });
}

void PackedRows::multiply(const char* weight, std::int64_t rows, float* sums) const {
  alignas(64) float widened[kRows * kSteps];
  if (length_ == 0) std::fill_n(sums, rows * columns_, 0.0f);
  for (std::int64_t step = 0; step < length_; step += kSteps) {
    const std::int64_t steps = std::min(kSteps, length_ - step);
    for (std::int64_t row = 0; row < rows; ++row)
      widen({weight, dtype_}, row * length_ + step, steps, widened + row * kSteps);
    for (std::int64_t column = 0; column < columns_; column += kWidth)
      gemm(sums + column * rows, {reinterpret_cast<const char*>(widened), kSteps * 4, 4}, rows, steps,
           reinterpret_cast<const std::uint32_t*>(block(column, step, steps)), kWidth, step ? kOnes : nullptr,
           DType::f32);
  }
}

}  // namespace arcmerge
