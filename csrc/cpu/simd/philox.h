// Philox-4x32-10 (Salmon et al. 2011), the random numbers of python/arcmerge/ops/philox.py.
#pragma once

#include <cstdint>

#include "cpu/simd/variant.h"

namespace arcmerge {

// The number of blocks that are computed together.
constexpr std::int64_t kPhiloxBlocks = 64;

// words[b]: the four words of the counter (low and high half of first + b, 0, 0), for b < kPhiloxBlocks.
template <class>
ARCMERGE_INLINE void philox(std::uint64_t key, std::uint64_t first, std::uint32_t (*words)[4]) {
  std::uint32_t c0[kPhiloxBlocks], c1[kPhiloxBlocks], c2[kPhiloxBlocks] = {}, c3[kPhiloxBlocks] = {};
  for (std::int64_t b = 0; b < kPhiloxBlocks; ++b) {
    c0[b] = std::uint32_t(first + b);
    c1[b] = std::uint32_t((first + b) >> 32);
  }
  std::uint32_t low = std::uint32_t(key), high = std::uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round, low += 0x9e3779b9, high += 0xbb67ae85)
    for (std::int64_t b = 0; b < kPhiloxBlocks; ++b) {
      const std::uint64_t product0 = std::uint64_t(0xd2511f53) * c0[b], product2 = std::uint64_t(0xcd9e8d57) * c2[b];
      c0[b] = std::uint32_t(product2 >> 32) ^ c1[b] ^ low;
      c1[b] = std::uint32_t(product2);
      c2[b] = std::uint32_t(product0 >> 32) ^ c3[b] ^ high;
      c3[b] = std::uint32_t(product0);
    }
  for (std::int64_t b = 0; b < kPhiloxBlocks; ++b) {
    words[b][0] = c0[b];
    words[b][1] = c1[b];
    words[b][2] = c2[b];
    words[b][3] = c3[b];
  }
}

}  // namespace arcmerge
