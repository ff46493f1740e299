// Masks of elements as bits. That of element e is bit e / 16 % 16 of the 16-bit word e / 256 * 16 + e % 16: a word has
// one bit from each of 16 registers, which two operations a register put there or take out.
#pragma once

#include <cstdint>

namespace arcmerge {

// kept: kKept for each set bit of elements [first, first + count), else 0.
void read_mask(const std::uint8_t* bits, std::int64_t first, std::int64_t count, std::uint16_t* kept);

// The opposite. first: a multiple of 256. Bits after the last one of 256 become 0.
void write_mask(const std::uint16_t* kept, std::int64_t first, std::int64_t count, std::uint8_t* bits);

}  // namespace arcmerge
