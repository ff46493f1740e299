// gemv: reads weights in the order of their addresses, at the bandwidth of memory.
//
// A sum runs in 2 * kLanes lanes of f32. Of every 128 bytes of a row, the first 64 go to the first kLanes lanes and the
// others to the second. bf16 elements go in pairs, the odd element first, as in vdpbf16ps:
//
//     bytes of a row   0 .. 63            64 .. 127          128 .. 191         192 .. 255         ...
//     lanes            0 .. 15            16 .. 31           0 .. 15            16 .. 31           ...
//
// Products of bf16 are exact in f32, so that their sums have the same bits in all variants, except that vdpbf16ps
// treats denormals as zeros. For f32, the baseline has no FMA and rounds the products too.
//
// The order of reads was measured for one row of x on two threads of an EPYC 9004, as a share of the bandwidth of
// `read`:
//
//     rows of 4.6 KB   one by one, prefetched one page ahead (where hardware prefetchers stop)   99 %
//                      one by one, prefetched two pages ahead                                    75 %
//                      four at a time                                                            80 %
//     rows of 18 KB    four at a time (each row pushes x out of L1)                              98 %
//                      one by one                                                                90 %
#include "cpu/matmul/gemv.h"

#include <cstring>

#include "cpu/simd/constants.h"
#include "cpu/simd/fma.h"
#include "cpu/simd/variant.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arcmerge {
namespace {

constexpr std::int64_t kLine = 64, kStep = 2 * kLine, kPage = 4096;
// Rows shorter than kShortRow are heads of keys: four of 512 bytes at a time, read 2 KB ahead, reach half the speed.
constexpr std::int64_t kShortRow = 2048, kLongRow = 10240;

// kLanes sums. A line of a row and of x adds one product to each, or two for bf16.
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
        part[i] = Fma<Isa>::multiply_add((F32)(a & 0xffff0000u), (F32)(b & 0xffff0000u), part[i]);
        part[i] = Fma<Isa>::multiply_add((F32)(a << 16), (F32)(b << 16), part[i]);
      } else {
        part[i] = Fma<Isa>::multiply_add((F32)a, (F32)b, part[i]);
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

// The cache for prefetched lines: L2, but not with AVX2. The L2 of an EPYC 7003 is half as large, and Python's own data
// would be evicted from it (a decoding step takes 222 ms, and 233 ms with L2).
template <class Isa>
constexpr int kLocality = Isa::kBytes == 64 ? 2 : 0;

// `kRows` rows of `bytes` bytes times `kCount` rows of x, with the weights a page or a tile ahead prefetched.
template <class Isa, DType dtype, int kRows, int kCount>
inline void tile(const char* weight, const char* x, std::int64_t bytes, float* sums, std::int64_t stride) {
  const char* prefetched = weight + (kRows == 1 ? kPage : kRows * bytes);
  Sum<Isa, dtype> sum[kRows][kCount];
  std::int64_t done = 0;
  for (; done + kStep <= bytes; done += kStep) {
    for (int line = 0; line < kRows * kStep / kLine; ++line, prefetched += kLine)
      __builtin_prefetch(prefetched, 0, kLocality<Isa>);
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

// Four rows by three rows of x fill 24 of 32 registers, and load seven for twelve products.
template <class Isa, DType dtype, int kRows>
inline void some_rows(const char* weight, const char* x, std::int64_t count, std::int64_t bytes, float* sums) {
  const std::int64_t stride = count;
  for (; count >= 3; count -= 3, x += 3 * bytes, sums += 3) tile<Isa, dtype, kRows, 3>(weight, x, bytes, sums, stride);
  if (count == 2) tile<Isa, dtype, kRows, 2>(weight, x, bytes, sums, stride);
  if (count == 1) tile<Isa, dtype, kRows, 1>(weight, x, bytes, sums, stride);
}

template <class Isa, DType dtype>
inline void all_rows(const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t bytes,
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
inline void bf16_gemv_body(const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t bytes,
                           float* sums) {
  all_rows<Isa, DType::bf16>(weight, rows, x, count, bytes, sums);
}

template <class Isa>
inline void f32_gemv_body(const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t bytes,
                          float* sums) {
  all_rows<Isa, DType::f32>(weight, rows, x, count, bytes, sums);
}

ARCMERGE_VARIANTS(void, bf16_gemv,
                  (const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t bytes,
                   float* sums),
                  (weight, rows, x, count, bytes, sums))
ARCMERGE_VARIANTS(void, f32_gemv,
                  (const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t bytes,
                   float* sums),
                  (weight, rows, x, count, bytes, sums))

}  // namespace

void gemv(const char* weight, std::int64_t rows, const char* x, std::int64_t count, std::int64_t length, DType dtype,
          float* sums) {
  (dtype == DType::f32 ? f32_gemv : bf16_gemv)(weight, rows, x, count, length * item_size(dtype), sums);
}

}  // namespace arcmerge
