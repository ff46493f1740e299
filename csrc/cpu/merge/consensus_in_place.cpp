// combine_in_place: consensus_combine of bf16 tensors in one go, without tiles of differences and codes.
#include "cpu/merge/consensus.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {
namespace {

// Counters of a register of elements.
template <class I32>
ARCMERGE_INLINE std::int64_t sum(const I32& counters) {
  std::int64_t total = 0;
  for (std::size_t lane = 0; lane < sizeof counters / 4; ++lane) total += counters[lane];
  return total;
}

// Two elements share a 32-bit word, the even one in the lower half.
template <class Isa, Election election, int known>
ARCMERGE_INLINE std::int64_t combine(InPlace* inputs, const char* base, bool rounded, const Consensus& consensus,
                                     std::int64_t count, char* out) {
  using F32 = typename Vector<Isa>::F32;
  using I32 = typename Vector<Isa>::I32;
  using U32 = typename Vector<Isa>::U32;
  constexpr std::int64_t kStep = Isa::kBytes / 2, kAhead = 512;
  const Rule<known> rule(consensus);
  InPlace from[known];
  std::copy_n(inputs, known, from);
  I32 with_upper[known] = {}, with_lower[known] = {}, nonfinite{};
  for (std::int64_t e = 0; e < count; e += kStep) {
    U32 base_words, x_words[known], kept_words[known];
    load(base_words, base + 2 * e);
    __builtin_prefetch(base + 2 * e + kAhead);
    for (int i = 0; i < known; ++i) {
      load(x_words[i], from[i].address + 2 * e);
      __builtin_prefetch(from[i].address + 2 * e + kAhead);
      load(kept_words[i], from[i].kept + e);
    }
    // The upper halves of the words that `part` makes of two elements each.
    const auto half = [&](const auto& part) ARCMERGE_LAMBDA {
      const F32 base_here = (F32)part(base_words);
      F32 x[known];
      I32 wrong{};
      for (int i = 0; i < known; ++i) {
        x[i] = (F32)part(x_words[i]) - base_here;
        wrong |= (I32)(x[i] - x[i]);
        const I32 codes = (I32)(rounded ? rounded_code<Isa>(x[i]) & 0xffff0000u : code<Isa>(x[i]));
        with_upper[i] -= codes == from[i].upper;
        with_lower[i] -= codes == from[i].lower;
        const I32 kept = (I32)part(kept_words[i]) < 0;
        x[i] = where<Isa>(kept & (codes >= from[i].bounds.low) & (codes <= from[i].bounds.high), x[i]);
      }
      const I32 bits = combined<Isa, election>(rule, [&x](int i) ARCMERGE_LAMBDA { return x[i]; }, base_here, wrong);
      const U32 result = (U32)((F32)bits == (F32)bits ? bits : I32{} + 0x7fc00000);
      const U32 out_words = result + 0x7fffu + (result >> 16 & 1u);
      nonfinite -= (I32)(out_words & 0x7f800000u) == 0x7f800000;
      return out_words;
    };
    const U32 even = half([](const U32& words) ARCMERGE_LAMBDA { return words << 16; });
    const U32 odd = half([](const U32& words) ARCMERGE_LAMBDA { return words & 0xffff0000u; });
    store(out + 2 * e, even >> 16 | (odd & 0xffff0000u));
  }
  for (int i = 0; i < known; ++i) {
    inputs[i].with_upper = sum(with_upper[i]);
    inputs[i].with_lower = sum(with_lower[i]);
  }
  return sum(nonfinite);
}

template <class Isa>
ARCMERGE_INLINE std::int64_t combine_any_body(InPlace* inputs, const char* base, bool rounded,
                                              const Consensus& consensus, std::int64_t count, char* out) {
  std::int64_t nonfinite = 0;
  with_rule(consensus, [&](auto election, auto known) ARCMERGE_LAMBDA {
    if constexpr (known > 0) nonfinite = combine<Isa, election, known>(inputs, base, rounded, consensus, count, out);
  });
  return nonfinite;
}

ARCMERGE_VARIANTS(std::int64_t, combine_any,
                  (InPlace * inputs, const char* base, bool rounded, const Consensus& consensus, std::int64_t count,
                   char* out),
                  (inputs, base, rounded, consensus, count, out))

}  // namespace

std::int64_t combine_in_place(InPlace* inputs, const char* base, bool rounded, const Consensus& consensus,
                              std::int64_t count, char* out) {
  return combine_any(inputs, base, rounded, consensus, count, out);
}

}  // namespace arcmerge
