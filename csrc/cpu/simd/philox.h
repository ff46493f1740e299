// Philox-4x32-10 (Salmon et al. 2011), the random numbers of python/arcmerge/ops/philox.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/variant.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arcmerge {

// Products of the lower halves of 64-bit lanes, for which compilers would multiply whole lanes.
template <class Isa>
struct Halves {
  typedef std::uint64_t U64 __attribute__((vector_size(Isa::kBytes)));

#if defined(__x86_64__)
  static inline void multiply(U64& out, const U64& a, const U64& b) {
    out = (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
  }
#else
  static inline void multiply(U64& out, const U64& a, const U64& b) { out = (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif
};

#if defined(__x86_64__)
template <>
struct Halves<Avx512> {
  typedef std::uint64_t U64 __attribute__((vector_size(64)));

  ARCMERGE_AVX512 static inline void multiply(U64& out, const U64& a, const U64& b) {
    out = (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
  }
};
template <>
struct Halves<Avx512Bf16> : Halves<Avx512> {};
template <>
struct Halves<Avx2> {
  typedef std::uint64_t U64 __attribute__((vector_size(32)));

  ARCMERGE_AVX2 static inline void multiply(U64& out, const U64& a, const U64& b) {
    out = (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
  }
};
#endif

// The number of blocks that are computed together.
constexpr std::int64_t kPhiloxBlocks = 16;

// A key, as it is in each round.
template <class Isa>
struct PhiloxKey {
  using U64 = typename Halves<Isa>::U64;
  U64 low[10], high[10];

  explicit ARCMERGE_INLINE PhiloxKey(std::uint64_t key) {
    for (int round = 0; round < 10; ++round) {
      low[round] = U64{} + std::uint32_t(std::uint32_t(key) + std::uint32_t(round) * 0x9e3779b9u);
      high[round] = U64{} + std::uint32_t(std::uint32_t(key >> 32) + std::uint32_t(round) * 0xbb67ae85u);
    }
  }
};

// numbers: the eight halves of the words of each counter (low and high half of first + b, 0, 0), for b < kPhiloxBlocks.
template <class Isa>
ARCMERGE_INLINE void philox(const PhiloxKey<Isa>& key, std::uint64_t first, std::uint16_t* numbers) {
  using U64 = typename Halves<Isa>::U64;
  // Steps of two registers hide the latency of the products.
  constexpr std::int64_t kWidth = Isa::kBytes / 8, kRegisters = 2;
  static constexpr std::uint64_t kCount[] = {0, 1, 2, 3, 4, 5, 6, 7};
  std::uint64_t pairs[2][kPhiloxBlocks];
  for (std::int64_t step = 0; step < kPhiloxBlocks; step += kRegisters * kWidth) {
    // A lane has a word of a block in its lower half, and anything in its upper half.
    U64 c0[kRegisters], c1[kRegisters], c2[kRegisters], c3[kRegisters];
    for (std::int64_t r = 0; r < kRegisters; ++r) {
      // The first round, with c2 = c3 = 0.
      std::memcpy(&c0[r], kCount, sizeof c0[r]);
      c0[r] += first + std::uint64_t(step + r * kWidth);
      U64 product0;
      Halves<Isa>::multiply(product0, c0[r], U64{} + 0xd2511f53u);
      c0[r] = c0[r] >> 32 ^ key.low[0];
      c1[r] = U64{};
      c2[r] = product0 >> 32 ^ key.high[0];
      c3[r] = product0;
    }
    for (int round = 1; round < 10; ++round)
      for (std::int64_t r = 0; r < kRegisters; ++r) {
        U64 product0, product2;
        Halves<Isa>::multiply(product0, c0[r], U64{} + 0xd2511f53u);
        Halves<Isa>::multiply(product2, c2[r], U64{} + 0xcd9e8d57u);
        c0[r] = (product2 >> 32) ^ c1[r] ^ key.low[round];
        c2[r] = (product0 >> 32) ^ c3[r] ^ key.high[round];
        c1[r] = product2;
        c3[r] = product0;
      }
    for (std::int64_t r = 0; r < kRegisters; ++r) {
      const U64 first_pair = (c0[r] & 0xffffffffu) | c1[r] << 32, second_pair = (c2[r] & 0xffffffffu) | c3[r] << 32;
      std::memcpy(pairs[0] + step + r * kWidth, &first_pair, sizeof first_pair);
      std::memcpy(pairs[1] + step + r * kWidth, &second_pair, sizeof second_pair);
    }
  }
  for (std::int64_t b = 0; b < kPhiloxBlocks; ++b) {
    std::memcpy(numbers + 8 * b, &pairs[0][b], 8);
    std::memcpy(numbers + 8 * b + 4, &pairs[1][b], 8);
  }
}

}  // namespace arcmerge
