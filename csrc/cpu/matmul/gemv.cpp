// dot_rows: weights read in the order in which they lie, as fast as they come.
//
// A sum runs in 32 lanes of f32: 64 bytes of a row go to the first 16, the next 64 to the others; bf16 in pairs, the
// odd element first, as vdpbf16ps takes them. Products of bf16 are exact in f32, so their sums have the same bits in
// all variants, but that vdpbf16ps takes denormals for zeros; of f32 the baseline, which has no FMA, rounds products
// too.
//
// One row of x, two threads of an EPYC 9004, as a share of what reading alone gets from memory: rows of 4.6 KB one by
// one, prefetched a page ahead (where hardware prefetchers stop), 99 %; two pages ahead, 75 %; four at a time, 80 %. Of
// rows of 18 KB, which push x out of L1 each time, four at a time, 98 %; one by one, 90 %.
#include "cpu/matmul/gemv.h"

#include <cstring>

#include "cpu/simd/fma.h"
#include "cpu/simd/variant.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arcmerge {
namespace {

constexpr int kLanes = 16;
constexpr std::int64_t kLine = 64, kStep = 2 * kLine, kPage = 4096;
// Below: heads of keys. Four of 512 bytes at a time, read 2 KB ahead, come at half the speed.
constexpr std::int64_t kShortRow = 2048, kLongRow = 10240;

// 16 sums, to which a line of a row and of x adds one product each, or two if they are bf16.
template <class Isa, DType dtype>
struct Lanes {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  static constexpr int kParts = kLanes * 4 / Isa::kBytes;
  F32 part[kParts] = {};

  inline void add(const char* row, const char* x) {
    for (int i = 0; i < kParts; ++i) {
      U32 a, b;
      std::memcpy(&a, row + i * sizeof a, sizeof a);
      std::memcpy(&b, x + i * sizeof b, sizeof b);
      if constexpr (dtype == DType::bf16) {
        part[i] = Fused<Isa>::multiply_add((F32)(a & 0xffff0000u), (F32)(b & 0xffff0000u), part[i]);
        part[i] = Fused<Isa>::multiply_add((F32)(a << 16), (F32)(b << 16), part[i]);
      } else {
        part[i] = Fused<Isa>::multiply_add((F32)a, (F32)b, part[i]);
      }
    }
  }
};

#if defined(__x86_64__)
template <>
struct Lanes<Avx512Bf16, DType::bf16> {
  static constexpr int kParts = 1;
  Vector<Avx512>::F32 part[kParts] = {};

  ARCMERGE_AVX512BF16 inline void add(const char* row, const char* x) {
    part[0] = (Vector<Avx512>::F32)_mm512_dpbf16_ps((__m512)part[0], (__m512bh)_mm512_loadu_si512(row),
                                                    (__m512bh)_mm512_loadu_si512(x));
  }
};
#endif

template <class Isa, DType dtype>
struct Sum {
  Lanes<Isa, dtype> lanes[2];

  inline void add(const char* row, const char* x) {
    lanes[0].add(row, x);
    lanes[1].add(row + kLine, x + kLine);
  }

  inline float total() const {
    typedef float Quarter __attribute__((vector_size(16)));
    Lanes<Isa, dtype> both;
    for (int i = 0; i < both.kParts; ++i) both.part[i] = lanes[0].part[i] + lanes[1].part[i];
    Quarter quarter[4];
    std::memcpy(quarter, both.part, sizeof quarter);
    const Quarter sum = (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
};

// Where lines that come ahead of their use go: into L2; in AVX2 past it, as the L2 of an EPYC 7003 is half as large and
// all that Python has in it would go (a step of decoding: 222 ms, by way of L2 233).
template <class Isa>
constexpr int kLocality = Isa::kBytes == 64 ? 2 : 0;

// `kRows` rows of `bytes` bytes by `kCount` of x, while what lies a page or a tile further on comes.
template <class Isa, DType dtype, int kRows, int kCount>
inline void tile(const char* weight, const char* x, std::int64_t bytes, float* sums, std::int64_t stride) {
  const char* ahead = weight + (kRows == 1 ? kPage : kRows * bytes);
  Sum<Isa, dtype> sum[kRows][kCount];
  std::int64_t done = 0;
  for (; done + kStep <= bytes; done += kStep) {
    for (int line = 0; line < kRows * kStep / kLine; ++line, ahead += kLine)
      __builtin_prefetch(ahead, 0, kLocality<Isa>);
    for (int i = 0; i < kRows; ++i)
      for (int t = 0; t < kCount; ++t) sum[i][t].add(weight + i * bytes + done, x + t * bytes + done);
  }
  if (done < bytes) {
    char last_row[kStep] = {}, last_x[kCount][kStep] = {};
    for (int t = 0; t < kCount; ++t) std::memcpy(last_x[t], x + t * bytes + done, bytes - done);
    for (int i = 0; i < kRows; ++i) {
      std::memcpy(last_row, weight + i * bytes + done, bytes - done);
      for (int t = 0; t < kCount; ++t) sum[i][t].add(last_row, last_x[t]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int t = 0; t < kCount; ++t) sums[i * stride + t] = sum[i][t].total();
}

// Four rows by three of x fill 24 registers of 32, and load seven for twelve products.
template <class Isa, DType dtype, int kRows>
inline void some_rows(const char* weight, const char* x, std::int64_t count, std::int64_t bytes, float* sums) {
  const std::int64_t stride = count;
  for (; count >= 3; count -= 3, x += 3 * bytes, sums += 3) tile<Isa, dtype, kRows, 3>(weight, x, bytes, sums, stride);
  if (count == 2) tile<Isa, dtype, kRows, 2>(weight, x, bytes, sums, stride);
  if (count == 1) tile<Isa, dtype, kRows, 1>(weight, x, bytes, sums, stride);
}

template <class Isa, DType dtype>
inline void rows_of(const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t bytes,
                    float* sums) {
  std::int64_t row = 0;
  if constexpr (Isa::kBytes == 64) {
    if (bytes >= kShortRow && (count > 1 || bytes > kLongRow))
      for (; row + 4 <= rows; row += 4)
        some_rows<Isa, dtype, 4>(weight + row * bytes, x, count, bytes, sums + row * count);
  }
  for (; row < rows; ++row) some_rows<Isa, dtype, 1>(weight + row * bytes, x, count, bytes, sums + row * count);
}

template <class Isa>
inline void bf16_rows_body(const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t bytes,
                           float* sums) {
  rows_of<Isa, DType::bf16>(weight, rows, x, count, bytes, sums);
}

template <class Isa>
inline void f32_rows_body(const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t bytes,
                          float* sums) {
  rows_of<Isa, DType::f32>(weight, rows, x, count, bytes, sums);
}

ARCMERGE_VARIANTS(void, bf16_rows,
                  (const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t bytes,
                   float* sums),
                  (weight, rows, x, count, bytes, sums))
ARCMERGE_VARIANTS(void, f32_rows,
                  (const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t bytes,
                   float* sums),
                  (weight, rows, x, count, bytes, sums))

}  // namespace

void dot_rows(const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t length,
              DType dtype, float* sums) {
  (dtype == DType::f32 ? f32_rows : bf16_rows)(weight, rows, x, count, length * item_size(dtype), sums);
}

}  // namespace arcmerge
