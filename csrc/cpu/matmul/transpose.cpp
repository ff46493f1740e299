// transpose: squares as wide as a register are transposed in registers, and single words are copied at the edges.
#include "cpu/matmul/transpose.h"

#include <cstring>

#include "cpu/simd/shuffle.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

// Exchanges the off-diagonal squares of `size` words in x and y, two rows at a distance of `size`.
template <class U32, int kWidth>
inline void exchange(U32& x, U32& y, int size) {
  U32 low, high;
  for (int j = 0; j < kWidth; ++j) {
    low[j] = j & size ? kWidth + j - size : j;
    high[j] = j & size ? kWidth + j : j + size;
  }
  const U32 first = shuffle(x, y, low);
  y = shuffle(x, y, high);
  x = first;
}

template <class Isa>
inline void square(std::uint32_t* out, std::int64_t columns, const char* source, std::int64_t stride) {
  using U32 = typename Vector<Isa>::U32;
  constexpr int kWidth = Isa::kBytes / 4;
  U32 row[kWidth];
  for (int i = 0; i < kWidth; ++i) std::memcpy(&row[i], source + i * stride, sizeof row[i]);
#pragma GCC unroll 4
  for (int size = kWidth / 2; size > 0; size /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i)
      if (!(i & size)) exchange<U32, kWidth>(row[i], row[i + size], size);
  for (int i = 0; i < kWidth; ++i) std::memcpy(out + i * columns, &row[i], sizeof row[i]);
}

template <class Isa>
inline void transpose_body(std::uint32_t* out, std::int64_t columns, const void* source, std::int64_t stride,
                           std::int64_t rows, std::int64_t words) {
  constexpr std::int64_t kWidth = Isa::kBytes / 4;
  const char* start = static_cast<const char*>(source);
  std::int64_t row = 0;
  for (; row + kWidth <= rows; row += kWidth, start += kWidth * stride) {
    std::int64_t word = 0;
    for (; word + kWidth <= words; word += kWidth)
      square<Isa>(out + word * columns + row, columns, start + word * 4, stride);
    for (; word < words; ++word)
      for (int i = 0; i < kWidth; ++i) std::memcpy(out + word * columns + row + i, start + i * stride + word * 4, 4);
  }
  for (; row < rows; ++row, start += stride)
    for (std::int64_t word = 0; word < words; ++word) std::memcpy(out + word * columns + row, start + word * 4, 4);
}

}  // namespace

ARCMERGE_VARIANTS(void, transpose,
                  (std::uint32_t* out, std::int64_t columns, const void* source, std::int64_t stride, std::int64_t rows,
                   std::int64_t words),
                  (out, columns, source, stride, rows, words))

}  // namespace arcmerge
