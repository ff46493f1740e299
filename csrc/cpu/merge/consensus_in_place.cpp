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
  // In two loops over some registers, which depend on fewer operations than one and so overlap more.
  constexpr int kSteps = kInPlace / kStep, kHalves = 2 * kSteps;
  F32 x[kHalves][known], base_of[kHalves];
  I32 invalid[kHalves];
  for (std::int64_t e = 0; e < count; e += kInPlace) {
    for (int half = 0; half < kHalves; ++half) {
      const std::int64_t at = e + half / 2 * kStep;
      const auto part = [half](const U32& words)
                            ARCMERGE_LAMBDA { return half % 2 ? words & 0xffff0000u : words << 16; };
      U32 words;
      load(words, base + 2 * at);
      if (half % 2 == 0) __builtin_prefetch(base + 2 * at + kAhead);
      const F32 base_here = (F32)part(words);
      base_of[half] = base_here;
      invalid[half] = I32{};
      for (int i = 0; i < known; ++i) {
        load(words, from[i].address + 2 * at);
        if (half % 2 == 0) __builtin_prefetch(from[i].address + 2 * at + kAhead);
        const F32 difference = (F32)part(words) - base_here;
        invalid[half] |= (I32)(difference - difference);
        const I32 codes = (I32)(rounded ? rounded_code<Isa>(difference) & 0xffff0000u : code<Isa>(difference));
        with_upper[i] -= codes == from[i].upper;
        with_lower[i] -= codes == from[i].lower;
        load(words, from[i].kept + at);
        const I32 kept = (I32)part(words) < 0;
        x[half][i] = where<Isa>(kept & (codes >= from[i].bounds.low) & (codes <= from[i].bounds.high), difference);
      }
    }
    for (int step = 0; step < kSteps; ++step) {
      U32 rounded_words[2];
      for (int part = 0; part < 2; ++part) {
        const int half = 2 * step + part;
        const F32* const here = x[half];
        const I32 bits = combined<Isa, election>(
            rule, [here](int i) ARCMERGE_LAMBDA { return here[i]; }, base_of[half], invalid[half]);
        const U32 result = (U32)((F32)bits == (F32)bits ? bits : I32{} + 0x7fc00000);
        rounded_words[part] = result + 0x7fffu + (result >> 16 & 1u);
        nonfinite -= (I32)(rounded_words[part] & 0x7f800000u) == 0x7f800000;
      }
      store(out + 2 * (e + step * kStep), rounded_words[0] >> 16 | (rounded_words[1] & 0xffff0000u));
    }
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
