#include "cpu/selection/uniform16.h"

#include "cpu/simd/philox.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

constexpr std::int64_t kNumbers = 8 * kPhiloxBlocks;

// numbers: kNumbers of them for each of the `times` calls of philox.
template <class Isa>
ARCMERGE_INLINE void numbers_body(std::uint64_t key, std::uint64_t block, std::int64_t times, std::uint16_t* numbers) {
  const PhiloxKey<Isa> keys(key);
  for (std::int64_t time = 0; time < times; ++time)
    philox<Isa>(keys, block + time * kPhiloxBlocks, numbers + time * kNumbers);
}

ARCMERGE_VARIANTS(void, numbers, (std::uint64_t key, std::uint64_t block, std::int64_t times, std::uint16_t* numbers),
                  (key, block, times, numbers))

}  // namespace

const std::uint16_t* uniform16(std::uint64_t key, std::int64_t first, std::int64_t count,
                               std::vector<std::uint16_t>& memory) {
  const std::int64_t times = (first % 8 + count + kNumbers - 1) / kNumbers;
  if (std::int64_t(memory.size()) < times * kNumbers) memory.resize(times * kNumbers);
  numbers(key, std::uint64_t(first / 8), times, memory.data());
  return memory.data() + first % 8;
}

}  // namespace arcmerge
