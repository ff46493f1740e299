// Masks of elements as bits: that of element e is bit e % 8 of byte e / 8.
#pragma once

#include <cstdint>
#include <cstring>

namespace arcmerge {

// The highest bits of 64 lanes, the first of which is the lowest one of the result.
inline std::uint64_t highest_bits(const std::uint16_t* lanes) {
  std::uint64_t bits = 0;
  for (int group = 0; group < 16; ++group) {
    std::uint64_t four;
    std::memcpy(&four, lanes + 4 * group, sizeof four);
    // The product has the bits of the four lanes in bits 48 to 51.
    bits |= ((four >> 15 & 0x0001000100010001) * 0x0001000200040008 >> 48 & 15) << 4 * group;
  }
  return bits;
}

// kept: kKept for each set bit of elements [first, first + count), else 0. Up to 8 bytes after the last one are read.
void read_mask(const std::uint8_t* bits, std::int64_t first, std::int64_t count, std::uint16_t* kept);

// The opposite. first: a multiple of 8. Bits after the last one of the last byte become 0.
void write_mask(const std::uint16_t* kept, std::int64_t first, std::int64_t count, std::uint8_t* bits);

}  // namespace arcmerge
