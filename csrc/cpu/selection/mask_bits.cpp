#include "cpu/selection/mask_bits.h"

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
  const auto read = [&](std::int64_t e) ARCMERGE_LAMBDA {
    std::uint32_t word;
    std::memcpy(&word, bits + e / 8, sizeof word);
    return (U16)(((U16{} + std::uint16_t(word >> shift)) & kBits) == kBits) & kKept;
  };
  std::int64_t e = 0;
  for (; e + 16 <= count; e += 16) {
    const U16 planes = read(e);
    std::memcpy(kept + e, &planes, sizeof planes);
  }
  if (e == count) return;
  const U16 planes = read(e);
  std::memcpy(kept + e, &planes, 2 * (count - e));
}

ARCMERGE_VARIANTS(void, read_bits, (const std::uint8_t* bits, int shift, std::int64_t count, std::uint16_t* kept),
                  (bits, shift, count, kept))

}  // namespace

void read_mask(const std::uint8_t* bits, std::int64_t first, std::int64_t count, std::uint16_t* kept) {
  read_bits(bits + first / 8, int(first % 8), count, kept);
}

void write_mask(const std::uint16_t* kept, std::int64_t first, std::int64_t count, std::uint8_t* bits) {
  static_assert(kKept == 0x8000, "the highest bit of a lane is taken");
  bits += first / 8;
  std::int64_t e = 0;
  for (; e + 64 <= count; e += 64) {
    const std::uint64_t word = highest_bits(kept + e);
    std::memcpy(bits + e / 8, &word, sizeof word);
  }
  if (e == count) return;
  std::uint16_t last[64] = {};
  std::memcpy(last, kept + e, 2 * (count - e));
  const std::uint64_t word = highest_bits(last);
  std::memcpy(bits + e / 8, &word, (count - e + 7) / 8);
}

}  // namespace arcmerge
