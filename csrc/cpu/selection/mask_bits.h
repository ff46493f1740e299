// Masks of elements as bits: that of element e is bit e % 8 of byte e / 8.
#pragma once

#include <cstdint>

namespace arcmerge {

// The number of bytes that may be read after the last one with bits.
constexpr std::int64_t kMaskPadding = 8;

// kept: kKept for each set bit of elements [first, first + count), else 0.
void read_mask(const std::uint8_t* bits, std::int64_t first, std::int64_t count, std::uint16_t* kept);

// The opposite. first: a multiple of 8. Bits after the last one of the last byte become 0.
void write_mask(const std::uint16_t* kept, std::int64_t first, std::int64_t count, std::uint8_t* bits);

}  // namespace arcmerge
