// combine_in_place: consensus_combine of bf16 tensors in one go, without tiles of differences and codes.
//
// Registers hold words of two elements, the even one in the lower half.
#include <algorithm>
#include <iterator>
#include <numeric>

#include "cpu/merge/consensus.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {
namespace {

template <class Isa>
struct Halves {
  typedef std::int16_t I16 __attribute__((vector_size(Isa::kBytes)));
};

template <class I16>
ARCMERGE_INLINE std::int64_t sum(const I16& counters) {
  std::int16_t lanes[sizeof counters / 2];
  store(lanes, counters);
  return std::accumulate(std::begin(lanes), std::end(lanes), std::int64_t(0));
}

// Whether any bit is set. (Some compilers take comparisons with AVX-512 apart.)
template <class I16>
ARCMERGE_INLINE bool any(const I16& bits) {
  std::uint64_t words[sizeof bits / 8], all = 0;
  store(words, bits);
  for (const std::uint64_t word : words) all |= word;
  return all != 0;
}

// How elements are selected by magnitude: not at all, by codes of magnitudes that are rounded to bf16, or by whole
// ones.
enum class By { nothing, rounded, whole };

// The codes of the even and the odd differences of a register. Those of a NaN may be any.
template <class Isa, By by>
struct Codes {
  using F32 = typename Vector<Isa>::F32;
  using I32 = typename Vector<Isa>::I32;
  using I16 = typename Halves<Isa>::I16;
  I32 even, odd;

  ARCMERGE_INLINE Codes(const F32& x, const F32& y) : even((I32)x & 0x7fffffff), odd((I32)y & 0x7fffffff) {}
  // A mask of those that are `to`.
  ARCMERGE_INLINE I16 equal(std::int32_t to) const { return both(even == to, odd == to); }
  // The sign bits are set for those that are out of bounds. (Some compilers take AVX-512 apart for pairs of
  // comparisons.)
  ARCMERGE_INLINE I16 outside(const Cuts::Bounds& bounds) const {
    return both((even - bounds.low) | (bounds.high - even), (odd - bounds.low) | (bounds.high - odd));
  }

 private:
  static ARCMERGE_INLINE I16 both(const I32& of_even, const I32& of_odd) {
    using U32 = typename Vector<Isa>::U32;
    return (I16)upper_halves((U32)of_even, (U32)of_odd);
  }
};

// Rounded codes fit 15 bits, so that one register has those of two.
template <class Isa>
struct Codes<Isa, By::rounded> {
  using F32 = typename Vector<Isa>::F32;
  using I16 = typename Halves<Isa>::I16;
  I16 codes;

  ARCMERGE_INLINE Codes(const F32& x, const F32& y) : codes((I16)upper_halves(rounded(x), rounded(y))) {}
  ARCMERGE_INLINE I16 equal(std::int32_t to) const { return codes == std::int16_t(to >> 16); }
  ARCMERGE_INLINE I16 outside(const Cuts::Bounds& bounds) const {
    const auto low = std::int16_t(std::min((std::int64_t(bounds.low) + 0xffff) >> 16, std::int64_t(0x7fff)));
    return (codes - low) | (std::int16_t(bounds.high >> 16) - codes);
  }

 private:
  static ARCMERGE_INLINE typename Vector<Isa>::U32 rounded(const F32& x) {
    return nearest_bf16((typename Vector<Isa>::U32)x & 0x7fffffffu);
  }
};

template <class Isa, Election election, int known, By by, Needs needs>
ARCMERGE_INLINE bool combine(InPlace* inputs, const char* base, const Consensus& consensus, std::int64_t count,
                             char* out) {
  using F32 = typename Vector<Isa>::F32;
  using I32 = typename Vector<Isa>::I32;
  using U32 = typename Vector<Isa>::U32;
  using I16 = typename Halves<Isa>::I16;
  constexpr std::int64_t kStep = Isa::kBytes / 2, kAhead = 512;
  constexpr std::int16_t kInfinite = 0x7f80;
  const Rule<known> rule(consensus);
  InPlace from[known];
  std::copy_n(inputs, known, from);
  I16 with_upper[known] = {}, with_lower[known] = {}, nonfinite{}, infinite{};
  // In loops over some registers, each of which depends on few operations, so that more of them overlap.
  constexpr int kSteps = kInPlace / kStep;
  F32 even[kSteps][known], odd[kSteps][known], quotients[kSteps][2];
  for (std::int64_t e = 0; e < count; e += kInPlace) {
    const char* const base_here = base + 2 * e;
    for (int step = 0; step < kSteps; ++step) {
      const std::int64_t at = e + step * kStep;
      U32 words;
      load(words, base + 2 * at);
      __builtin_prefetch(base + 2 * at + kAhead);
      const F32 base_even = (F32)(words << 16), base_odd = (F32)(words & 0xffff0000u);
      for (int i = 0; i < known; ++i) {
        load(words, from[i].address + 2 * at);
        __builtin_prefetch(from[i].address + 2 * at + kAhead);
        const F32 x = (F32)(words << 16) - base_even, y = (F32)(words & 0xffff0000u) - base_odd;
        nonfinite |= (I16)(x - x) | (I16)(y - y);
        I16 selected;  // by the sign bits
        load(selected, from[i].kept + at);
        if constexpr (by != By::nothing) {
          const Codes<Isa, by> codes(x, y);
          with_upper[i] -= codes.equal(from[i].upper);
          with_lower[i] -= codes.equal(from[i].lower);
          selected &= ~codes.outside(from[i].bounds);
        }
        even[step][i] = where<Isa>((I32)((U32)selected << 16) >> 31, x);
        odd[step][i] = where<Isa>((I32)selected >> 31, y);
      }
    }
    for (int step = 0; step < kSteps; ++step) {
      const auto added = [&](const F32* x) ARCMERGE_LAMBDA {
        return added_to_base<Isa, election, needs>(rule, [x](int i) ARCMERGE_LAMBDA { return x[i]; });
      };
      quotients[step][0] = added(even[step]);
      quotients[step][1] = added(odd[step]);
    }
    for (int step = 0; step < kSteps; ++step) {
      U32 words;
      load(words, base_here + step * Isa::kBytes);
      const auto x = (U32)((F32)(words << 16) + quotients[step][0]);
      const auto y = (U32)((F32)(words & 0xffff0000u) + quotients[step][1]);
      const U32 result = upper_halves(nearest_bf16(x), nearest_bf16(y));
      store(out + 2 * e + step * Isa::kBytes, result);
      // The NaN of finite values has the exponent of infinity when it is rounded too. The sign bit is set for those.
      infinite |= ((I16)result & std::int16_t(0x7fff)) + std::int16_t(0x8000 - kInfinite);
    }
  }
  for (int i = 0; i < known; ++i) {
    inputs[i].with_upper = sum(with_upper[i]);
    inputs[i].with_lower = sum(with_lower[i]);
  }
  return !any(nonfinite) && !any((I16)(infinite & std::int16_t(-0x8000)));
}

// Calls f(constant) with the constant that `value` is, among those from `from` to `to`.
template <class T, T from, T to, class F>
ARCMERGE_INLINE void with_constant(T value, const F& f) {
  if (value == from) return f(std::integral_constant<T, from>{});
  if constexpr (from != to) with_constant<T, static_cast<T>(static_cast<int>(from) + 1), to>(value, f);
}

template <class Isa>
ARCMERGE_INLINE bool combine_any_body(InPlace* inputs, const char* base, By by, const Consensus& consensus,
                                      std::int64_t count, char* out) {
  bool finite = false;
  const auto any = [&](const auto& has) {
    return std::any_of(consensus.factors.begin(), consensus.factors.end(), has);
  };
  Needs needs = Needs::sum;
  if (any([](const Consensus::Factors& factors) { return factors.share != 0; })) needs = Needs::quotient;
  if (consensus.floor != 0 || any([](const Consensus::Factors& factors) { return factors.alone != factors.value; }))
    needs = Needs::all;
  with_constant<Election, Election::none, Election::sum>(consensus.election, [&](auto election) ARCMERGE_LAMBDA {
    with_constant<int, 1, int(kMostInPlace)>(int(consensus.factors.size()), [&](auto known) ARCMERGE_LAMBDA {
      with_constant<By, By::nothing, By::whole>(by, [&](auto by) ARCMERGE_LAMBDA {
        with_constant<Needs, Needs::sum, Needs::all>(needs, [&](auto needs) ARCMERGE_LAMBDA {
          // No method has other rules, which the general code is for.
          constexpr bool exists =
              needs == Needs::all ? by == By::nothing : needs == Needs::sum || election != Election::none;
          if constexpr (exists) finite = combine<Isa, election, known, by, needs>(inputs, base, consensus, count, out);
        });
      });
    });
  });
  return finite;
}

ARCMERGE_VARIANTS(bool, combine_any,
                  (InPlace * inputs, const char* base, By by, const Consensus& consensus, std::int64_t count,
                   char* out),
                  (inputs, base, by, consensus, count, out))

}  // namespace

bool combine_in_place(InPlace* inputs, const char* base, bool rounded, const Consensus& consensus, std::int64_t count,
                      char* out) {
  const bool cuts = std::any_of(inputs, inputs + consensus.factors.size(), [](const InPlace& input) {
    return input.bounds.low > 0 || input.bounds.high < 0x7f800000 || input.upper >= 0 || input.lower >= 0;
  });
  return combine_any(inputs, base, !cuts ? By::nothing : rounded ? By::rounded : By::whole, consensus, count, out);
}

}  // namespace arcmerge
