#include "cpu/selection/mask_bits.h"

#include <algorithm>
#include <cstring>

#include "cpu/selection/selection.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

typedef std::uint16_t U16 __attribute__((vector_size(32)));
constexpr std::int64_t kBlock = 256;
static_assert(kKept == 0x8000, "shifts move the highest bit");

template <class>
ARCMERGE_INLINE void read_blocks_body(const std::uint8_t* bits, std::int64_t blocks, std::uint16_t* kept) {
  for (std::int64_t block = 0; block < blocks; ++block) {
    U16 words;
    std::memcpy(&words, bits + sizeof words * block, sizeof words);
    for (int place = 0; place < 16; ++place) {
      const U16 planes = words << (15 - place) & kKept;
      std::memcpy(kept + kBlock * block + 16 * place, &planes, sizeof planes);
    }
  }
}

template <class>
ARCMERGE_INLINE void write_blocks_body(const std::uint16_t* kept, std::int64_t blocks, std::uint8_t* bits) {
  for (std::int64_t block = 0; block < blocks; ++block) {
    U16 words{};
    for (int place = 0; place < 16; ++place) {
      U16 planes;
      std::memcpy(&planes, kept + kBlock * block + 16 * place, sizeof planes);
      words |= planes >> (15 - place);
    }
    std::memcpy(bits + sizeof words * block, &words, sizeof words);
  }
}

ARCMERGE_VARIANTS(void, read_blocks, (const std::uint8_t* bits, std::int64_t blocks, std::uint16_t* kept),
                  (bits, blocks, kept))
ARCMERGE_VARIANTS(void, write_blocks, (const std::uint16_t* kept, std::int64_t blocks, std::uint8_t* bits),
                  (kept, blocks, bits))

}  // namespace

void read_mask(const std::uint8_t* bits, std::int64_t first, std::int64_t count, std::uint16_t* kept) {
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t before = (first + done) % kBlock, whole = (count - done) / kBlock;
    const std::uint8_t* const from = bits + sizeof(U16) * ((first + done) / kBlock);
    if (before == 0 && whole > 0) {
      read_blocks(from, whole, kept + done);
      done += whole * kBlock;
    } else {
      std::uint16_t block[kBlock];
      read_blocks(from, 1, block);
      const std::int64_t size = std::min(kBlock - before, count - done);
      std::copy_n(block + before, size, kept + done);
      done += size;
    }
  }
}

void write_mask(const std::uint16_t* kept, std::int64_t first, std::int64_t count, std::uint8_t* bits) {
  bits += sizeof(U16) * (first / kBlock);
  const std::int64_t whole = count / kBlock;
  write_blocks(kept, whole, bits);
  if (whole * kBlock == count) return;
  std::uint16_t last[kBlock] = {};
  std::copy(kept + whole * kBlock, kept + count, last);
  write_blocks(last, 1, bits + sizeof(U16) * whole);
}

}  // namespace arcmerge
