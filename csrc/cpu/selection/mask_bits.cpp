#include "cpu/selection/mask_bits.h"

#include <algorithm>
#include <cstring>

#include "cpu/selection/selection.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

// shift: the bit of the first element in the first byte.
template <class>
ARCMERGE_INLINE void read_bits_body(const std::uint8_t* bits, int shift, std::int64_t count, std::uint16_t* kept) {
  typedef std::uint16_t U16 __attribute__((vector_size(32)));
  constexpr U16 kBits = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  for (std::int64_t e = 0; e < count; e += 16) {
    std::uint32_t word;
    std::memcpy(&word, bits + e / 8, sizeof word);
    const U16 found = ((U16{} + std::uint16_t(word >> shift)) & kBits) == kBits;
    const U16 planes = found & kKept;
    std::memcpy(kept + e, &planes, 2 * std::min<std::int64_t>(count - e, 16));
  }
}

ARCMERGE_VARIANTS(void, read_bits, (const std::uint8_t* bits, int shift, std::int64_t count, std::uint16_t* kept),
                  (bits, shift, count, kept))

}  // namespace

void read_mask(const std::uint8_t* bits, std::int64_t first, std::int64_t count, std::uint16_t* kept) {
  read_bits(bits + first / 8, int(first % 8), count, kept);
}

void write_mask(const std::uint16_t* kept, std::int64_t first, std::int64_t count, std::uint8_t* bits) {
  static_assert(kKept == 0x8000, "the highest bit of a lane is taken");
  for (std::int64_t e = 0; e < count; e += 8) {
    std::uint64_t four[2] = {};
    std::memcpy(four, kept + e, 2 * std::min<std::int64_t>(count - e, 8));
    std::uint64_t byte = 0;
    for (int half = 0; half < 2; ++half) {
      // The product has bit i of the four lanes in bit 48 + i.
      const std::uint64_t lanes = four[half] >> 15 & 0x0001000100010001;
      byte |= (lanes * 0x0001000200040008 >> 48 & 15) << 4 * half;
    }
    bits[(first + e) / 8] = std::uint8_t(byte);
  }
}

}  // namespace arcmerge
