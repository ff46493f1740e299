// combine: a linear combination of operands, the last step of many merges. It reads each operand once and rounds
// each result once.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/simd/convert.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "merge.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arcmerge {
namespace {

// Magnitudes with these bits or more round to an infinite bf16. Adding kAlarm to their bits sets the sign bit, and to
// the bits of smaller magnitudes it does not.
constexpr std::uint32_t kRoundsToInfinity = 0x7f7f8000;
constexpr std::uint32_t kAlarm = 0x80000000 - kRoundsToInfinity;

template <class Isa>
struct Pair {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  static constexpr int kStep = Isa::kBytes / 2;  // the number of bf16 elements in a register

  float c_a, c_b;
  U32 alarm = {};  // has a sign bit if any output is not finite

  // The bits of c_a * a + c_b * b, whose upper halves are the rounded result.
  ARCMERGE_INLINE U32 rounded_sum(U32 a, U32 b) {
    const U32 bits = (U32)((F32)a * c_a + (F32)b * c_b);
    alarm |= (bits & 0x7fffffffu) + kAlarm;
    return bits + 0x7fffu + (bits >> 16 & 1u);
  }

  // Even elements are the lower halves of 32-bit words, odd elements the upper halves.
  ARCMERGE_INLINE void step(const char* a, const char* b, char* out) {
    U32 x, y;
    std::memcpy(&x, a, sizeof x);
    std::memcpy(&y, b, sizeof y);
    const U32 even = rounded_sum(x << 16, y << 16);
    const U32 odd = rounded_sum(x & 0xffff0000u, y & 0xffff0000u);
    const U32 words = even >> 16 | (odd & 0xffff0000u);
    std::memcpy(out, &words, sizeof words);
  }

  ARCMERGE_INLINE bool all_finite() const {
    std::uint32_t words[Isa::kBytes / 4], any = 0;
    std::memcpy(words, &alarm, sizeof words);
    for (std::uint32_t word : words) any |= word;
    return any >> 31 == 0;
  }
};

#if defined(__x86_64__)
// Element 2i of the output is element i of the low half of a register, and element 2i + 1 is that of the high half.
alignas(64) constexpr std::uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// Combines 32 elements, or those in the mask, and rounds them with vcvtne2ps2bf16: 60 GB/s in L2, compared with 46 in
// integer arithmetic (one core of an EPYC 9004). The instruction treats denormals as zeros and keeps the payload of
// NaN, so that both set the alarm, as infinity does.
ARCMERGE_AVX512BF16 inline void convert_step(__mmask32 elements, const char* a, const char* b, __m512 c_a, __m512 c_b,
                                             char* out, __mmask32& alarm) {
  const __m512i odd_half = _mm512_set1_epi32(int(0xffff0000)), exponent = _mm512_set1_epi16(0x7f80);
  const __m512i x = _mm512_maskz_loadu_epi16(elements, a), y = _mm512_maskz_loadu_epi16(elements, b);
  const __m512 even = _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), c_a),
                                    _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), c_b));
  const __m512 odd = _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(x, odd_half)), c_a),
                                   _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(y, odd_half)), c_b));
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  constexpr int kDenormal = 0x20;
  alarm |= _mm512_fpclass_ps_mask(even, kDenormal) | _mm512_fpclass_ps_mask(odd, kDenormal) |
           _mm512_cmpeq_epi16_mask(_mm512_and_si512(rounded, exponent), exponent);
  _mm512_mask_storeu_epi16(out, elements, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), rounded));
}

ARCMERGE_AVX512BF16 bool convert_block(const char* a, const char* b, float c_a, float c_b, char* out,
                                       std::int64_t count) {
  const __m512 all_c_a = _mm512_set1_ps(c_a), all_c_b = _mm512_set1_ps(c_b);
  __mmask32 alarm = 0;
  std::int64_t i = 0;
  for (; i + 32 <= count; i += 32)
    convert_step(~__mmask32(0), a + 2 * i, b + 2 * i, all_c_a, all_c_b, out + 2 * i, alarm);
  if (i < count)
    convert_step((__mmask32(1) << (count - i)) - 1, a + 2 * i, b + 2 * i, all_c_a, all_c_b, out + 2 * i, alarm);
  return alarm == 0;
}
#endif

// The fast path for two bf16 operands and bf16 outputs. Returns false if outputs may be wrong or not finite.
template <class Isa>
ARCMERGE_INLINE bool bf16_pair_block_body(const char* a, const char* b, float c_a, float c_b, char* out,
                                          std::int64_t count) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<Isa, Avx512Bf16>) return convert_block(a, b, c_a, c_b, out, count);
#endif
  constexpr int kStep = Pair<Isa>::kStep;
  Pair<Isa> pair{c_a, c_b};
  std::int64_t i = 0;
  for (; i + kStep <= count; i += kStep) pair.step(a + 2 * i, b + 2 * i, out + 2 * i);
  if (i < count) {
    char last_a[2 * kStep] = {}, last_b[2 * kStep] = {}, last_out[2 * kStep];
    std::memcpy(last_a, a + 2 * i, 2 * (count - i));
    std::memcpy(last_b, b + 2 * i, 2 * (count - i));
    pair.step(last_a, last_b, last_out);
    std::memcpy(out + 2 * i, last_out, 2 * (count - i));
  }
  return pair.all_finite();
}

template <class>
ARCMERGE_INLINE void scale_body(float* sum, const float* x, float c, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] = c * x[i];
}

template <class>
ARCMERGE_INLINE void add_scaled_body(float* sum, const float* x, float c, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] += c * x[i];
}

// The same with one coefficient per element, `stride` floats apart.
template <class>
ARCMERGE_INLINE void scale_each_body(float* sum, const float* x, const float* c, std::int64_t stride,
                                     std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] = c[i * stride] * x[i];
}

template <class>
ARCMERGE_INLINE void add_scaled_each_body(float* sum, const float* x, const float* c, std::int64_t stride,
                                          std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] += c[i * stride] * x[i];
}

ARCMERGE_VARIANTS(bool, bf16_pair_block,
                  (const char* a, const char* b, float c_a, float c_b, char* out, std::int64_t count),
                  (a, b, c_a, c_b, out, count))
ARCMERGE_VARIANTS(void, scale, (float* sum, const float* x, float c, std::int64_t count), (sum, x, c, count))
ARCMERGE_VARIANTS(void, add_scaled, (float* sum, const float* x, float c, std::int64_t count), (sum, x, c, count))
ARCMERGE_VARIANTS(void, scale_each,
                  (float* sum, const float* x, const float* c, std::int64_t stride, std::int64_t count),
                  (sum, x, c, stride, count))
ARCMERGE_VARIANTS(void, add_scaled_each,
                  (float* sum, const float* x, const float* c, std::int64_t stride, std::int64_t count),
                  (sum, x, c, stride, count))

std::int64_t combine_tile(char* out, DType out_dtype, const std::vector<Operand>& operands, const float* coefficients,
                          std::int64_t first, std::int64_t count) {
  alignas(64) float x[kTile], sum[kTile];
  for (std::size_t j = 0; j < operands.size(); ++j) {
    widen(operands[j], first, count, x);
    (j == 0 ? scale : add_scaled)(sum, x, coefficients[j], count);
  }
  return narrow(sum, count, out_dtype, out);
}

std::int64_t combine_range(char* out, DType out_dtype, const std::vector<Operand>& operands, const float* coefficients,
                           std::int64_t first, std::int64_t count) {
  const bool is_fast =
      operands.size() == 2 && out_dtype == DType::bf16 && is_plain_bf16(operands[0]) && is_plain_bf16(operands[1]);
  std::int64_t nonfinite = 0;
  for (std::int64_t done = 0; done < count; done += kTile) {
    const std::int64_t size = std::min(kTile, count - done), start = first + done;
    char* target = out + done * item_size(out_dtype);
    if (is_fast && bf16_pair_block(operands[0].address + 2 * start, operands[1].address + 2 * start, coefficients[0],
                                   coefficients[1], target, size))
      continue;
    nonfinite += combine_tile(target, out_dtype, operands, coefficients, start, size);
  }
  return nonfinite;
}

}  // namespace

std::int64_t combine(void* out, DType out_dtype, const std::vector<Operand>& operands,
                     const std::vector<float>& coefficients, std::int64_t first, std::int64_t count) {
  require_operands(operands);
  require_range(first, count);
  if (coefficients.size() != operands.size())
    throw std::invalid_argument("'coefficients' must be as many as the operands (" + std::to_string(operands.size()) +
                                "), got " + std::to_string(coefficients.size()));
  return combine_range(static_cast<char*>(out), out_dtype, operands, coefficients.data(), first, count);
}

std::int64_t combine_rows(void* out, DType out_dtype, const std::vector<Operand>& operands, const float* coefficients,
                          std::int64_t first, std::int64_t count, std::int64_t columns) {
  require_operands(operands);
  require_range(first, count);
  require_matrix(0, columns);
  std::int64_t nonfinite = 0;
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t row = (first + done) / columns;
    const std::int64_t size = std::min((row + 1) * columns - (first + done), count - done);
    nonfinite += combine_range(static_cast<char*>(out) + done * item_size(out_dtype), out_dtype, operands,
                               coefficients + row * std::int64_t(operands.size()), first + done, size);
    done += size;
  }
  return nonfinite;
}

std::int64_t combine_columns(void* out, DType out_dtype, const std::vector<Operand>& operands,
                             const float* coefficients, std::int64_t first, std::int64_t count, std::int64_t columns) {
  require_operands(operands);
  require_range(first, count);
  require_matrix(0, columns);
  const std::int64_t k = std::int64_t(operands.size());
  alignas(64) float x[kTile], sum[kTile];
  std::int64_t nonfinite = 0;
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t column = (first + done) % columns;
    const std::int64_t size = std::min({kTile, columns - column, count - done});
    for (std::int64_t j = 0; j < k; ++j) {
      widen(operands[j], first + done, size, x);
      (j == 0 ? scale_each : add_scaled_each)(sum, x, coefficients + column * k + j, k, size);
    }
    nonfinite += narrow(sum, size, out_dtype, static_cast<char*>(out) + done * item_size(out_dtype));
    done += size;
  }
  return nonfinite;
}

}  // namespace arcmerge
