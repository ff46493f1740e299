// gemm: multiplies tiles whose sums stay in registers. With AVX-512 a tile has eight rows by three registers of
// columns: its 24 sums hide the latency of 4 cycles twice over, and a step loads 11 values for 24 products.
#include "cpu/matmul/gemm.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/simd/fma.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

// AVX2 has 16 registers. f32 takes 12 sums, two right words and a left word; bf16 takes 8 sums, but twice as many
// words.
template <class Isa, DType dtype>
constexpr int kMaxRows = Isa::kBytes == 64   ? 8
                         : Isa::kBytes == 32 ? (dtype == DType::f32 ? 6 : 4)
                                             : 2;
template <class Isa>
constexpr int kMaxUnits = Isa::kBytes == 64 ? kColumns / kLanes : 1;

// A register of words of the right operand, and its product with one word of the left operand.
template <class Isa, DType dtype>
struct Factor {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  U32 words;

  inline void add_product(F32& sum, std::uint32_t left) const {
    const U32 all = U32{} + left;
    if constexpr (dtype == DType::bf16) {
      sum = Fma<Isa>::multiply_add((F32)(all & 0xffff0000u), (F32)(words & 0xffff0000u), sum);
      sum = Fma<Isa>::multiply_add((F32)(all << 16), (F32)(words << 16), sum);
    } else {
      sum = Fma<Isa>::multiply_add((F32)all, (F32)words, sum);
    }
  }
};

#if defined(__x86_64__)
template <>
struct Factor<Avx512Bf16, DType::bf16> {
  typedef Vector<Avx512>::F32 F32;
  typedef Vector<Avx512>::U32 U32;
  U32 words;

  ARCMERGE_AVX512BF16 inline void add_product(F32& sum, std::uint32_t left) const {
    sum = (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)words);
  }
};
#endif

template <class Isa, DType dtype, int kRows, int kUnits>
inline void tile(float* out, const char* left, const LeftOperand& strides, std::int64_t steps,
                 const std::uint32_t* right, std::int64_t columns, const float* factors) {
  using F32 = typename Vector<Isa>::F32;
  constexpr int kWidth = Isa::kBytes / 4, kRegisters = kUnits * int(kLanes) / kWidth;
  F32 sum[kRows][kRegisters] = {};
  if (factors)
    for (int r = 0; r < kRegisters; ++r) {
      F32 factor;
      std::memcpy(&factor, factors + r * kWidth, sizeof factor);
      for (int i = 0; i < kRows; ++i) {
        std::memcpy(&sum[i][r], out + i * columns + r * kWidth, sizeof factor);
        sum[i][r] *= factor;
      }
    }
  for (std::int64_t step = 0; step < steps; ++step, left += strides.step_stride, right += columns) {
    Factor<Isa, dtype> factor[kRegisters];
    for (int r = 0; r < kRegisters; ++r) std::memcpy(&factor[r].words, right + r * kWidth, sizeof factor[r].words);
    for (int i = 0; i < kRows; ++i) {
      std::uint32_t word;
      std::memcpy(&word, left + i * strides.row_stride, sizeof word);
      for (int r = 0; r < kRegisters; ++r) factor[r].add_product(sum[i][r], word);
    }
  }
  for (int i = 0; i < kRows; ++i) std::memcpy(out + i * columns, sum[i], sizeof sum[i]);
}

// Rows [row, rows) by kUnits units of kLanes columns: kRows rows at a time, then half as many, down to one.
template <class Isa, DType dtype, int kRows, int kUnits>
inline void all_rows(float* out, const LeftOperand& left, std::int64_t row, std::int64_t rows, std::int64_t steps,
                     const std::uint32_t* right, std::int64_t columns, const float* factors) {
  for (; row + kRows <= rows; row += kRows)
    tile<Isa, dtype, kRows, kUnits>(out + row * columns, left.address + row * left.row_stride, left, steps, right,
                                    columns, factors);
  if constexpr (kRows > 1)
    all_rows<Isa, dtype, kRows / 2, kUnits>(out, left, row, rows, steps, right, columns, factors);
}

template <class Isa, DType dtype>
inline void all_columns(float* out, const LeftOperand& left, std::int64_t rows, std::int64_t steps,
                        const std::uint32_t* right, std::int64_t columns, const float* factors) {
  for (std::int64_t column = 0; column < columns;) {
    const std::int64_t units = std::min<std::int64_t>((columns - column) / kLanes, kMaxUnits<Isa>);
    const float* own_factors = factors ? factors + column : nullptr;
    const auto multiply = [&](auto count) {
      all_rows<Isa, dtype, kMaxRows<Isa, dtype>, decltype(count)::value>(out + column, left, 0, rows, steps,
                                                                         right + column, columns, own_factors);
    };
    if constexpr (kMaxUnits<Isa> == 3) {
      if (units == 3) multiply(std::integral_constant<int, 3>());
      if (units == 2) multiply(std::integral_constant<int, 2>());
    }
    if (units == 1) multiply(std::integral_constant<int, 1>());
    column += units * kLanes;
  }
}

template <class Isa>
inline void bf16_gemm_body(float* out, const LeftOperand& left, std::int64_t rows, std::int64_t steps,
                           const std::uint32_t* right, std::int64_t columns, const float* factors) {
  all_columns<Isa, DType::bf16>(out, left, rows, steps, right, columns, factors);
}

template <class Isa>
inline void f32_gemm_body(float* out, const LeftOperand& left, std::int64_t rows, std::int64_t steps,
                          const std::uint32_t* right, std::int64_t columns, const float* factors) {
  all_columns<Isa, DType::f32>(out, left, rows, steps, right, columns, factors);
}

ARCMERGE_VARIANTS(void, bf16_gemm,
                  (float* out, const LeftOperand& left, std::int64_t rows, std::int64_t steps,
                   const std::uint32_t* right, std::int64_t columns, const float* factors),
                  (out, left, rows, steps, right, columns, factors))
ARCMERGE_VARIANTS(void, f32_gemm,
                  (float* out, const LeftOperand& left, std::int64_t rows, std::int64_t steps,
                   const std::uint32_t* right, std::int64_t columns, const float* factors),
                  (out, left, rows, steps, right, columns, factors))

}  // namespace

void gemm(float* out, const LeftOperand& left, std::int64_t rows, std::int64_t steps, const std::uint32_t* right,
          std::int64_t columns, const float* factors, DType dtype) {
  (dtype == DType::f32 ? f32_gemm : bf16_gemm)(out, left, rows, steps, right, columns, factors);
}

}  // namespace arcmerge
