// consensus_combine: adds to a base the differences that are selected and that agree on a sign, and counts them.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>

#include "cpu/merge/draws.h"
#include "cpu/merge/selection.h"
#include "cpu/simd/constants.h"
#include "cpu/simd/fma.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {
namespace {

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

// Drops differences in place. invalid |= NaN where one is not finite.
template <class Isa>
ARCMERGE_INLINE void select_body(float* differences, const std::uint32_t* codes, const std::uint16_t* kept,
                                 Cuts::Bounds bounds, std::int64_t count, std::uint32_t* invalid) {
  using I32 = typename Vector<Isa>::I32;
  for (std::int64_t e = 0; e < count; e += kWidth<Isa>) {
    typename Vector<Isa>::F32 x;
    typename Vector<Isa>::HalfU16 keep;
    I32 code, wrong;
    load(x, differences + e);
    load(code, codes + e);
    load(keep, kept + e);
    load(wrong, invalid + e);
    store(invalid + e, wrong | (I32)(x - x));
    const I32 kept_here = __builtin_convertvector(keep, I32) != 0;
    store(differences + e, where<Isa>(kept_here & (code >= bounds.low) & (code <= bounds.high), x));
  }
}

template <class>
ARCMERGE_INLINE void multiply_body(float* x, const float* factors, std::int64_t count) {
  // A dropped difference stays 0 where its factor is infinite.
  for (std::int64_t e = 0; e < count; ++e) x[e] = x[e] == 0 ? x[e] : x[e] * factors[e];
}

// The selected differences of all inputs in a tile, and how they are combined.
struct Chosen {
  const Tile<float>* differences;
  const Consensus& consensus;
  std::int64_t count;
};

// The same for a number of inputs that is known, which keeps factors in registers, or is not (0).
template <int known>
struct Inputs {
  const Tile<float>* differences;
  Consensus::Factors factors[known];
  static constexpr int count = known;

  explicit ARCMERGE_INLINE Inputs(const Chosen& chosen) : differences(chosen.differences) {
    std::copy_n(chosen.consensus.factors.begin(), known, factors);
  }
};
template <>
struct Inputs<0> {
  const Tile<float>* differences;
  const Consensus::Factors* factors;
  int count;

  explicit ARCMERGE_INLINE Inputs(const Chosen& chosen)
      : differences(chosen.differences),
        factors(chosen.consensus.factors.data()),
        count(int(chosen.consensus.factors.size())) {}
};

// What inputs have in common in a register of elements.
template <class Isa, Election election>
struct Elected {
  using F32 = typename Vector<Isa>::F32;
  using I32 = typename Vector<Isa>::I32;
  using U32 = typename Vector<Isa>::U32;
  F32 total{};     // the sum of votes
  U32 sign{};      // the sign bit where it elects the negative sign
  I32 agreeing{};  // how many inputs agree

  template <class Inputs>
  ARCMERGE_INLINE Elected(const Inputs& inputs, bool zero_is_negative, std::int64_t e) {
    if constexpr (election != Election::none) {
      for (int i = 0; i < inputs.count; ++i) {
        F32 vote = inputs.factors[i].vote * difference(inputs, i, e);
        if (election == Election::count) vote = __builtin_convertvector((vote < 0) - (vote > 0), F32);
        total = i == 0 ? vote : total + vote;
      }
      sign = (U32)(zero_is_negative ? total <= 0 : total < 0) & 0x80000000u;
    }
    for (int i = 0; i < inputs.count; ++i) agreeing -= agrees(difference(inputs, i, e), inputs.factors[i].vote);
  }

  template <class Inputs>
  static ARCMERGE_INLINE F32 difference(const Inputs& inputs, int i, std::int64_t e) {
    F32 x;
    load(x, inputs.differences[i].of + e);
    return x;
  }

  // A mask of the differences that agree.
  ARCMERGE_INLINE I32 agrees(const F32& x, float vote) const {
    if constexpr (election == Election::none) return x != 0;
    return (F32)((U32)(vote * x) ^ sign) > 0;
  }
};

// out = base + the sum of values / the sum of shares, or NaN where a difference is invalid.
template <class Isa, Election election, int known>
ARCMERGE_INLINE void add_values(const Chosen& chosen, const float* base, const std::uint32_t* invalid, float* out) {
  using F32 = typename Vector<Isa>::F32;
  using I32 = typename Vector<Isa>::I32;
  const Inputs<known> inputs(chosen);
  const float floor = chosen.consensus.floor;
  const bool zero_is_negative = chosen.consensus.zero_is_negative;
  const std::int64_t count = chosen.count;
  for (std::int64_t e = 0; e < count; e += kWidth<Isa>) {
    const Elected<Isa, election> elected(inputs, zero_is_negative, e);
    F32 numerator{}, denominator{}, from;
    for (int i = 0; i < inputs.count; ++i) {
      const auto& [vote, value, share, alone] = inputs.factors[i];
      const F32 x = elected.difference(inputs, i, e);
      const I32 mask = elected.agrees(x, vote);
      const F32 added = where<Isa>(mask, (elected.agreeing == 1 ? broadcast<Isa>(alone) : broadcast<Isa>(value)) * x);
      numerator = i == 0 ? added : numerator + added;
      denominator =
          i == 0 ? where<Isa>(mask, broadcast<Isa>(share)) : denominator + where<Isa>(mask, broadcast<Isa>(share));
    }
    if (floor != 0)
      denominator = denominator < floor ? broadcast<Isa>(floor) : denominator;
    else
      denominator = denominator == 0 ? broadcast<Isa>(1) : denominator;
    I32 wrong;
    load(from, base + e);
    load(wrong, invalid + e);
    const F32 result = from + numerator / denominator;
    store(out + e, wrong == 0 ? (I32)result : I32{} + 0x7fc00000);
  }
}

// Counters in registers of any variant; their sums count.
struct alignas(64) Lanes {
  std::int32_t of[16] = {};

  std::int64_t sum() const { return std::accumulate(of, of + 16, std::int64_t(0)); }
};
struct Roles {
  Lanes alone, shared;
};

template <class Isa, Election election>
ARCMERGE_INLINE void count_roles(const Chosen& chosen, Roles* roles, Lanes& balance) {
  typename Vector<Isa>::I32 sum;
  const auto subtract = [&sum](Lanes& lanes, const auto& mask) {
    load(sum, lanes.of);
    store(lanes.of, sum - mask);
  };
  const Inputs<0> inputs(chosen);
  for (std::int64_t e = 0; e < chosen.count; e += kWidth<Isa>) {
    const Elected<Isa, election> elected(inputs, chosen.consensus.zero_is_negative, e);
    subtract(balance, (elected.total > 0) - (elected.total < 0));
    for (int i = 0; i < inputs.count; ++i) {
      const auto mask = elected.agrees(elected.difference(inputs, i, e), inputs.factors[i].vote);
      subtract(roles[i].alone, mask & (elected.agreeing == 1));
      subtract(roles[i].shared, mask & (elected.agreeing > 1));
    }
  }
}

template <class Isa, Election election>
ARCMERGE_INLINE void add_values_of(const Chosen& chosen, const float* base, const std::uint32_t* invalid, float* out) {
  switch (chosen.consensus.factors.size()) {
    case 1:
      return add_values<Isa, election, 1>(chosen, base, invalid, out);
    case 2:
      return add_values<Isa, election, 2>(chosen, base, invalid, out);
    case 3:
      return add_values<Isa, election, 3>(chosen, base, invalid, out);
    default:
      return add_values<Isa, election, 0>(chosen, base, invalid, out);
  }
}

template <class Isa>
ARCMERGE_INLINE void add_values_any_body(const Chosen& chosen, const float* base, const std::uint32_t* invalid,
                                         float* out) {
  const Election election = chosen.consensus.election;
  if (election == Election::none) add_values_of<Isa, Election::none>(chosen, base, invalid, out);
  if (election == Election::sum) add_values_of<Isa, Election::sum>(chosen, base, invalid, out);
  if (election == Election::count) add_values_of<Isa, Election::count>(chosen, base, invalid, out);
}

template <class Isa>
ARCMERGE_INLINE void count_roles_any_body(const Chosen& chosen, Roles* roles, Lanes& balance) {
  const Election election = chosen.consensus.election;
  if (election == Election::none) count_roles<Isa, Election::none>(chosen, roles, balance);
  if (election == Election::sum) count_roles<Isa, Election::sum>(chosen, roles, balance);
  if (election == Election::count) count_roles<Isa, Election::count>(chosen, roles, balance);
}

template <class>
ARCMERGE_INLINE void add_squares_body(double* lanes, const float* x, std::int64_t padded) {
  for (std::int64_t e = 0; e < padded; e += kLanes)
    for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += double(x[e + lane]) * double(x[e + lane]);
}

ARCMERGE_VARIANTS(void, select,
                  (float* differences, const std::uint32_t* codes, const std::uint16_t* kept, Cuts::Bounds bounds,
                   std::int64_t count, std::uint32_t* invalid),
                  (differences, codes, kept, bounds, count, invalid))
ARCMERGE_VARIANTS(void, multiply, (float* x, const float* factors, std::int64_t count), (x, factors, count))
ARCMERGE_VARIANTS(void, add_values_any,
                  (const Chosen& chosen, const float* base, const std::uint32_t* invalid, float* out),
                  (chosen, base, invalid, out))
ARCMERGE_VARIANTS(void, count_roles_any, (const Chosen& chosen, Roles* roles, Lanes& balance), (chosen, roles, balance))
ARCMERGE_VARIANTS(void, add_squares, (double* lanes, const float* x, std::int64_t padded), (lanes, x, padded))

// The tiles of a range: the selected differences of all inputs.
class Selected {
 public:
  Selected(const std::vector<Operand>& operands, const Operand& base, const Selection& selection,
           const Consensus& consensus, const std::vector<EqualsBefore>& before, std::int64_t count)
      : consensus_(consensus), differences_(operands, base, selection), draws_(operands, base, selection) {
    for (std::size_t i = 0; i < operands.size(); ++i) cuts_.emplace_back(selection.cuts[i], before[i], count);
  }

  // Differences after the last one are 0 up to a multiple of kLanes.
  void read(std::int64_t first, std::int64_t count) {
    first_ = first;
    count_ = count;
    differences_.read(first, count);
    std::fill(invalid_.of, invalid_.of + kTile, 0);
    for (std::size_t i = 0; i < cuts_.size(); ++i) {
      float* x = differences_[i];
      const std::uint16_t* kept = draws_.draw(i, first, count, kept_.of);
      const Cuts::Bounds bounds = cuts_[i].next(differences_.codes(i), count, kept, kept_.of);
      select(x, differences_.codes(i), kept, bounds, count, invalid_.of);
      if (consensus_.inverse) {
        draws_.inverses(i, first, count, inverses_.of);
        multiply(x, inverses_.of, count);
      }
      std::fill(x + count, x + padded(), 0.0f);
    }
  }

  std::int64_t combine(char* out, DType dtype) {
    Tile<float> result;
    differences_.read_base(first_, count_);
    add_values_any(chosen(), differences_.base(), invalid_.of, result.of);
    return narrow(result.of, count_, dtype, out);
  }

  void sum(double (*squares)[kLanes], ConsensusSums& sums) {
    std::vector<Roles> roles(cuts_.size());
    Lanes balance;
    count_roles_any(chosen(), roles.data(), balance);
    for (std::size_t i = 0; i < cuts_.size(); ++i) {
      add_squares(squares[i], differences_[i], padded());
      sums.alone[i] += roles[i].alone.sum();
      sums.shared[i] += roles[i].shared.sum();
    }
    sums.balance += balance.sum();
  }

 private:
  std::int64_t padded() const { return (count_ + kLanes - 1) / kLanes * kLanes; }
  Chosen chosen() const { return {differences_.tiles(), consensus_, count_}; }

  const Consensus& consensus_;
  std::int64_t first_ = 0, count_ = 0;
  Differences differences_;
  Draws draws_;
  std::vector<Cuts> cuts_;
  Tile<std::uint16_t> kept_;
  Tile<float> inverses_;
  Tile<std::uint32_t> invalid_;
};

void require_consensus(const std::vector<Operand>& operands, const Selection& selection, const Consensus& consensus,
                       const std::vector<EqualsBefore>& before, std::int64_t first, std::int64_t count) {
  require_selection(operands, selection, first, count);
  require_each("cuts", selection.cuts.size(), operands.size());
  require_each("factors", consensus.factors.size(), operands.size());
  require_each("before", before.size(), operands.size());
}

}  // namespace

std::int64_t consensus_combine(void* out, DType out_dtype, const std::vector<Operand>& operands, const Operand& base,
                               const Selection& selection, const Consensus& consensus,
                               const std::vector<EqualsBefore>& before, std::int64_t first, std::int64_t count) {
  require_consensus(operands, selection, consensus, before, first, count);
  Selected selected(operands, base, selection, consensus, before, count);
  std::int64_t nonfinite = 0;
  for (std::int64_t done = 0; done < count; done += kTile) {
    selected.read(first + done, std::min(kTile, count - done));
    nonfinite += selected.combine(static_cast<char*>(out) + done * item_size(out_dtype), out_dtype);
  }
  return nonfinite;
}

ConsensusSums consensus_sums(const std::vector<Operand>& operands, const Operand& base, const Selection& selection,
                             const Consensus& consensus, const std::vector<EqualsBefore>& before, std::int64_t first,
                             std::int64_t count) {
  require_consensus(operands, selection, consensus, before, first, count);
  const std::size_t k = operands.size();
  ConsensusSums sums{std::vector<double>(k), std::vector<std::int64_t>(k), std::vector<std::int64_t>(k)};
  const std::unique_ptr<double[][kLanes]> squares(new double[k][kLanes]());
  Selected selected(operands, base, selection, consensus, before, count);
  for (std::int64_t done = 0; done < count; done += kTile) {
    selected.read(first + done, std::min(kTile, count - done));
    selected.sum(squares.get(), sums);
  }
  for (std::size_t i = 0; i < k; ++i)
    for (std::int64_t lane = 0; lane < kLanes; ++lane) sums.squares[i] += squares[i][lane];
  return sums;
}

}  // namespace arcmerge
