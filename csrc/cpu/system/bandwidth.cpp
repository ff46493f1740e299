// read: how fast memory can be read, to compare other operations with.
#include <algorithm>
#include <cstring>

#include "cpu/simd/variant.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

constexpr std::int64_t kPiece = 1 << 20;
constexpr std::int64_t kAhead = 4096;  // a page, where the processor's own prefetching stops

template <class Isa>
ARCMERGE_INLINE std::uint64_t read_piece_body(const char* bytes, std::int64_t count) {
  typedef typename Vector<Isa>::U32 U32;
  constexpr std::int64_t kLine = 64;
  U32 mixed[kLine / Isa::kBytes] = {};
  for (std::int64_t i = 0; i + kLine <= count; i += kLine) {
    __builtin_prefetch(bytes + i + kAhead);
    for (std::int64_t j = 0; j < kLine / Isa::kBytes; ++j) {
      U32 value;
      std::memcpy(&value, bytes + i + j * Isa::kBytes, Isa::kBytes);
      mixed[j] ^= value;
    }
  }
  std::uint64_t sum = 0;
  for (const U32& register_of : mixed)
    for (int lane = 0; lane < Isa::kBytes / 4; ++lane) sum ^= register_of[lane];
  return sum;
}

ARCMERGE_VARIANTS(std::uint64_t, read_piece, (const char* bytes, std::int64_t count), (bytes, count))

}  // namespace

void read(const void* address, std::int64_t count) {
  parallel((count + kPiece - 1) / kPiece, 1, [&](std::int64_t first, std::int64_t last) {
    const std::int64_t begin = first * kPiece, end = std::min(count, last * kPiece);
    volatile std::uint64_t kept = read_piece(static_cast<const char*>(address) + begin, end - begin);
    (void)kept;
  });
}

}  // namespace arcmerge
