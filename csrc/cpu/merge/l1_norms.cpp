// l1_norms: the exact sums of the magnitudes of dropped and of kept elements.
//
// Differences of bf16 operands are added in f64, tile by tile: such a sum is exact where the exponents of a tile lie
// close together, as those of weights do. Other tiles are added by exponent.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/selection/draws.h"
#include "cpu/selection/selection.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {
namespace {

constexpr int kPlanes = 2, kExponents = 256;

// The sums of a tile, in units of the last bit of bf16 at exponent `unit`.
struct TileSums {
  std::uint16_t below, largest;  // the smallest code that is not 0, less 1, and the largest code
  double all, kept;              // times 2^-896
};

// A bf16 value whose bits are in the place of those of a f64 is that value times 2^-896.
constexpr int kScale = 896;

template <class Isa>
ARCMERGE_INLINE void add_bf16_body(const char* x, const char* base, const std::uint16_t* kept, std::int64_t count,
                                   TileSums* sums) {
  using U32 = typename Vector<Isa>::U32;
  using U64 = typename Vector<Isa>::U64;
  using F64 = typename Vector<Isa>::F64;
  using U16 = typename Vector<Isa>::U16;
  typedef std::int16_t I16 __attribute__((vector_size(Isa::kBytes)));
  constexpr std::int64_t kStep = Isa::kBytes / 2, kLanes = Isa::kBytes / 8;
  constexpr std::uint64_t kPlace = 0xffffull << 45;
  F64 all[4] = {}, with_kept[4] = {};
  U16 below = U16{} + std::uint16_t(0xffff);
  U16 largest = U16{};
  const auto add = [](const U64& codes, F64* to) ARCMERGE_LAMBDA {
    to[0] += (F64)(codes << 45 & kPlace);
    to[1] += (F64)(codes << 29 & kPlace);
    to[2] += (F64)(codes << 13 & kPlace);
    to[3] += (F64)(codes >> 3 & kPlace);
  };
  const auto step = [&](const char* x_at, const char* base_at, const std::uint16_t* kept_at) ARCMERGE_LAMBDA {
    U32 x_words, base_words;
    I16 keeps;
    std::memcpy(&x_words, x_at, sizeof x_words);
    std::memcpy(&base_words, base_at, sizeof base_words);
    std::memcpy(&keeps, kept_at, sizeof keeps);
    const U16 codes = (U16)rounded_codes_of_words<Isa>(x_words, base_words);
    const U16 less = codes - 1;
    below = less < below ? less : below;
    largest = codes > largest ? codes : largest;
    add((U64)codes, all);
    add((U64)(codes & (U16)(keeps >> 15)), with_kept);
  };
  std::int64_t e = 0;
  for (; e + kStep <= count; e += kStep) step(x + 2 * e, base + 2 * e, kept + e);
  if (e < count) {
    char last_x[2 * kStep] = {}, last_base[2 * kStep] = {};
    std::uint16_t last_kept[kStep] = {};
    std::memcpy(last_x, x + 2 * e, 2 * (count - e));
    std::memcpy(last_base, base + 2 * e, 2 * (count - e));
    std::memcpy(last_kept, kept + e, 2 * (count - e));
    step(last_x, last_base, last_kept);
  }
  std::uint16_t lowest[kStep], highest[kStep];
  std::memcpy(lowest, &below, sizeof lowest);
  std::memcpy(highest, &largest, sizeof highest);
  sums->below = *std::min_element(lowest, lowest + kStep);
  sums->largest = *std::max_element(highest, highest + kStep);
  sums->all = sums->kept = 0;
  for (std::int64_t i = 0; i < kLanes; ++i)
    for (int part = 0; part < 4; ++part) {
      sums->all += all[part][i];
      sums->kept += with_kept[part][i];
    }
}

ARCMERGE_VARIANTS(void, add_bf16,
                  (const char* x, const char* base, const std::uint16_t* kept, std::int64_t count, TileSums* sums),
                  (x, base, kept, count, sums))

// Adds n, less than 2^53 units of the last bit of f32 at an exponent, to a table of 24 bits an exponent.
void add_at(std::int64_t* table, int exponent, std::int64_t n) {
  constexpr int kBits = 24;
  for (; n != 0; n >>= kBits, exponent += kBits) table[exponent] += n & ((1 << kBits) - 1);
}

// Adds a tile of bf16 operands to the tables of dropped and of kept elements, unless its sums may not be exact.
bool add_exact(const TileSums& sums, std::int64_t* table) {
  if (sums.largest == 0) return true;
  const int low = (sums.below + 1) >> 7, high = sums.largest >> 7;
  // The last bit of bf16 at exponent `low` is that of f32 at an exponent that is larger by 16. Sums of kTile elements
  // of 8 bits have 8 + 10 + high - low bits.
  static_assert(kTile == 1 << 10);
  constexpr int kMost = 190;  // three digits of add_at end below the exponent of infinity
  if (low < 1 || low > kMost || high >= kExponents - 1 || high - low > 53 - 18) return false;
  const auto units = [&](double sum) { return std::int64_t(std::ldexp(sum, kScale + 134 - low)); };
  const std::int64_t all = units(sums.all), kept = units(sums.kept);
  add_at(table, low + 16, all - kept);
  add_at(table + kExponents, low + 16, kept);
  return true;
}

}  // namespace

void l1_norms(std::int64_t* out, const std::vector<Operand>& operands, const Operand& base, const Selection& selection,
              std::int64_t first, std::int64_t count) {
  require_selection(operands, selection, first, count);
  const std::size_t k = operands.size();
  const bool in_place = selection.rounded && !selection.joint && !selection.row_scales && is_plain_bf16(base);
  Differences differences(operands, base, selection);
  Draws draws(operands, base, selection, true);
  Tile<std::uint16_t> drawn;
  for (std::int64_t done = 0; done < count; done += kTile) {
    const std::int64_t size = std::min(kTile, count - done), start = first + done;
    bool is_read = false;
    for (std::size_t i = 0; i < k; ++i) {
      const std::uint16_t* const kept = draws.draw(i, start, size, drawn.of);
      std::int64_t* const table = out + std::int64_t(i) * kPlanes * kExponents;
      if (in_place && is_plain_bf16(operands[i])) {
        TileSums sums;
        add_bf16(operands[i].address + 2 * start, base.address + 2 * start, kept, size, &sums);
        if (add_exact(sums, table)) continue;
      }
      if (!is_read) differences.read(start, size);
      is_read = true;
      const std::uint32_t* const codes = differences.codes(i);
      for (std::int64_t e = 0; e < size; ++e) {
        const std::uint32_t exponent = codes[e] >> 23, significand = (codes[e] & 0x7fffff) | (exponent > 0) << 23;
        table[(kept[e] ? kExponents : 0) + exponent] += significand;
      }
    }
  }
}

}  // namespace arcmerge
