// The arithmetic of consensus_combine, on registers of elements.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/selection/selection.h"
#include "cpu/simd/fma.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {

template <class Isa>
constexpr std::int64_t kWidth = Isa::kBytes / 4;

template <class Register, class T>
ARCMERGE_INLINE void load(Register& to, const T* from) {
  std::memcpy(&to, from, sizeof to);
}
template <class Register, class T>
ARCMERGE_INLINE void store(T* to, const Register& from) {
  std::memcpy(to, &from, sizeof from);
}

// `value` where the mask is set, else 0.
template <class Isa>
ARCMERGE_INLINE typename Vector<Isa>::F32 where(const typename Vector<Isa>::I32& mask,
                                                const typename Vector<Isa>::F32& value) {
  return (typename Vector<Isa>::F32)(mask & (typename Vector<Isa>::I32)value);
}

// Consensus for a number of inputs that is known, which keeps factors in registers, or is not (0).
template <int known>
struct Rule {
  static constexpr int count = known;
  Consensus::Factors factors[known];
  float floor;
  bool zero_is_negative;

  explicit ARCMERGE_INLINE Rule(const Consensus& consensus)
      : floor(consensus.floor), zero_is_negative(consensus.zero_is_negative) {
    std::copy_n(consensus.factors.begin(), known, factors);
  }
};
template <>
struct Rule<0> {
  const int count;
  const Consensus::Factors* factors;
  float floor;
  bool zero_is_negative;

  explicit ARCMERGE_INLINE Rule(const Consensus& consensus)
      : count(int(consensus.factors.size())),
        factors(consensus.factors.data()),
        floor(consensus.floor),
        zero_is_negative(consensus.zero_is_negative) {}
};

// Calls f(election, known) with constants.
template <class F>
ARCMERGE_INLINE void with_election(Election election, const F& f) {
  if (election == Election::none) f(std::integral_constant<Election, Election::none>{});
  if (election == Election::sum) f(std::integral_constant<Election, Election::sum>{});
  if (election == Election::count) f(std::integral_constant<Election, Election::count>{});
}
template <class F>
ARCMERGE_INLINE void with_rule(const Consensus& consensus, const F& f) {
  with_election(consensus.election, [&](auto election) ARCMERGE_LAMBDA {
    switch (consensus.factors.size()) {
      case 1:
        return f(election, std::integral_constant<int, 1>{});
      case 2:
        return f(election, std::integral_constant<int, 2>{});
      case 3:
        return f(election, std::integral_constant<int, 3>{});
      default:
        return f(election, std::integral_constant<int, 0>{});
    }
  });
}

// What the differences of all inputs have in common.
template <class Isa, Election election>
struct Elected {
  using F32 = typename Vector<Isa>::F32;
  using I32 = typename Vector<Isa>::I32;
  using U32 = typename Vector<Isa>::U32;
  F32 total{};     // the sum of votes
  U32 sign{};      // the sign bit where it elects the negative sign
  I32 agreeing{};  // how many inputs agree

  // difference(i): the selected differences of input i.
  template <class Rule, class Difference>
  ARCMERGE_INLINE Elected(const Rule& rule, const Difference& difference) {
    if constexpr (election != Election::none) {
      for (int i = 0; i < rule.count; ++i) {
        F32 vote = rule.factors[i].vote * difference(i);
        if (election == Election::count) vote = __builtin_convertvector((vote < 0) - (vote > 0), F32);
        total = i == 0 ? vote : total + vote;
      }
      sign = (U32)(rule.zero_is_negative ? total <= 0 : total < 0) & 0x80000000u;
    }
    for (int i = 0; i < rule.count; ++i) agreeing -= agrees(difference(i), rule.factors[i].vote);
  }

  // A mask of the differences that agree.
  ARCMERGE_INLINE I32 agrees(const F32& x, float vote) const {
    if constexpr (election == Election::none) return x != 0;
    return (F32)((U32)(vote * x) ^ sign) > 0;
  }
};

// What a rule needs: the sum of values alone; also the division by the sum of shares; or also the floor of that, and
// the factors of inputs that are alone.
enum class Needs { sum, quotient, all };

// The sum of values / the sum of shares.
template <class Isa, Election election, Needs needs, class Rule, class Difference>
ARCMERGE_INLINE typename Vector<Isa>::F32 added_to_base(const Rule& rule, const Difference& difference) {
  using F32 = typename Vector<Isa>::F32;
  using I32 = typename Vector<Isa>::I32;
  const Elected<Isa, election> elected(rule, difference);
  F32 numerator{}, denominator{};
  for (int i = 0; i < rule.count; ++i) {
    const auto& factors = rule.factors[i];
    const F32 x = difference(i);
    const I32 mask = elected.agrees(x, factors.vote);
    F32 value = broadcast<Isa>(factors.value);
    if constexpr (needs == Needs::all) value = elected.agreeing == 1 ? broadcast<Isa>(factors.alone) : value;
    const F32 added = where<Isa>(mask, value * x);
    const F32 shared = where<Isa>(mask, broadcast<Isa>(factors.share));
    numerator = i == 0 ? added : numerator + added;
    denominator = i == 0 ? shared : denominator + shared;
  }
  if constexpr (needs == Needs::sum) return numerator;
  if (needs == Needs::all && rule.floor != 0) {
    const F32 floor = broadcast<Isa>(rule.floor);
    return numerator / (denominator < floor ? floor : denominator);
  }
  return numerator / (denominator == 0 ? broadcast<Isa>(1) : denominator);
}

// A tile of a bf16 input in place, and its elements that are selected.
struct InPlace {
  const char* address;
  const std::uint16_t* kept;
  Cuts::Bounds bounds;
  std::int32_t upper, lower;            // codes to count
  std::int64_t with_upper, with_lower;  // the results
};

constexpr std::size_t kMostInPlace = 3;
// The whole of consensus_combine for up to kMostInPlace bf16 inputs and bf16 results, without `inverse` and without
// counts of votes. count: a multiple of kInPlace. Returns false, with any results, where a difference or a result is
// not finite, and for rules that no method has.
constexpr std::int64_t kInPlace = 128;
bool combine_in_place(InPlace* inputs, const char* base, bool rounded, const Consensus& consensus, std::int64_t count,
                      char* out);

}  // namespace arcmerge
