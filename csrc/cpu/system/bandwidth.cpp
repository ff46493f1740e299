// read: reads memory at its full bandwidth, to compare other operations with.
#include <algorithm>
#include <cstring>

#include "cpu/simd/variant.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

constexpr std::int64_t kChunk = 1 << 20;
constexpr std::int64_t kPrefetchDistance = 4096;  // a page, where hardware prefetchers stop

template <class Isa>
ARCMERGE_INLINE std::uint64_t read_chunk_body(const char* bytes, std::int64_t count) {
  typedef typename Vector<Isa>::U32 U32;
  constexpr std::int64_t kLine = 64;
  U32 mixed[kLine / Isa::kBytes] = {};
  for (std::int64_t i = 0; i + kLine <= count; i += kLine) {
    __builtin_prefetch(bytes + i + kPrefetchDistance);
    for (std::int64_t j = 0; j < kLine / Isa::kBytes; ++j) {
      U32 value;
      std::memcpy(&value, bytes + i + j * Isa::kBytes, Isa::kBytes);
      mixed[j] ^= value;
    }
  }
  std::uint64_t sum = 0;
  for (const U32& words : mixed)
    for (int lane = 0; lane < Isa::kBytes / 4; ++lane) sum ^= words[lane];
  return sum;
}

ARCMERGE_VARIANTS(std::uint64_t, read_chunk, (const char* bytes, std::int64_t count), (bytes, count))

}  // namespace

void read(const void* address, std::int64_t count) {
  parallel((count + kChunk - 1) / kChunk, 1, [&](std::int64_t first, std::int64_t last) {
    const std::int64_t begin = first * kChunk, end = std::min(count, last * kChunk);
    volatile std::uint64_t kept = read_chunk(static_cast<const char*>(address) + begin, end - begin);
    (void)kept;
  });
}

}  // namespace arcmerge
