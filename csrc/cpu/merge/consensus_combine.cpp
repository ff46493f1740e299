// consensus_combine: adds to a base the differences that are selected and that agree on a sign, and counts them.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>

#include "cpu/merge/consensus.h"
#include "cpu/selection/draws.h"
#include "cpu/selection/selection.h"
#include "cpu/simd/constants.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {
namespace {

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
    // By sign bits, because some compilers take AVX-512 apart for pairs of comparisons.
    const I32 selected = __builtin_convertvector(keep, I32) << 16 & ~((code - bounds.low) | (bounds.high - code));
    store(differences + e, where<Isa>(selected >> 31, x));
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

// The differences of input i from element e on.
template <class Isa>
ARCMERGE_INLINE auto differences_at(const Chosen& chosen, std::int64_t e) {
  return [tiles = chosen.differences, e](int i) {
    typename Vector<Isa>::F32 x;
    load(x, tiles[i].of + e);
    return x;
  };
}

// out = the result. invalid: the bits of a NaN where a difference is not finite, else 0.
template <class Isa, Election election, int known>
ARCMERGE_INLINE void add_values(const Chosen& chosen, const float* base, const std::uint32_t* invalid, float* out) {
  const Rule<known> rule(chosen.consensus);
  const std::int64_t count = chosen.count;
  for (std::int64_t e = 0; e < count; e += kWidth<Isa>) {
    typename Vector<Isa>::F32 from;
    typename Vector<Isa>::I32 wrong;
    load(from, base + e);
    load(wrong, invalid + e);
    const auto difference = differences_at<Isa>(chosen, e);
    const auto result = from + added_to_base<Isa, election, Needs::all>(rule, difference);
    store(out + e, (typename Vector<Isa>::I32)result | wrong);
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
  const Rule<0> rule(chosen.consensus);
  for (std::int64_t e = 0; e < chosen.count; e += kWidth<Isa>) {
    const auto difference = differences_at<Isa>(chosen, e);
    const Elected<Isa, election> elected(rule, difference);
    subtract(balance, (elected.total > 0) - (elected.total < 0));
    for (int i = 0; i < rule.count; ++i) {
      const auto mask = elected.agrees(difference(i), rule.factors[i].vote);
      subtract(roles[i].alone, mask & (elected.agreeing == 1));
      subtract(roles[i].shared, mask & (elected.agreeing > 1));
    }
  }
}

template <class Isa>
ARCMERGE_INLINE void add_values_any_body(const Chosen& chosen, const float* base, const std::uint32_t* invalid,
                                         float* out) {
  with_rule(chosen.consensus, [&](auto election, auto known)
                                  ARCMERGE_LAMBDA { add_values<Isa, election, known>(chosen, base, invalid, out); });
}

template <class Isa>
ARCMERGE_INLINE void count_roles_any_body(const Chosen& chosen, Roles* roles, Lanes& balance) {
  with_election(chosen.consensus.election,
                [&](auto election) ARCMERGE_LAMBDA { count_roles<Isa, election>(chosen, roles, balance); });
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
      : operands_(operands),
        base_(base),
        selection_(selection),
        consensus_(consensus),
        differences_(operands, base, selection),
        draws_(operands, base, selection, false) {
    for (std::size_t i = 0; i < operands.size(); ++i) cuts_.emplace_back(selection.cuts[i], before[i], count);
  }

  // Differences after the last one are 0 up to a multiple of kLanes.
  void read(std::int64_t first, std::int64_t count) {
    count_ = count;
    differences_.read(first, count);
    std::fill(invalid_.of, invalid_.of + kTile, 0);
    for (std::size_t i = 0; i < cuts_.size(); ++i) {
      float* x = differences_[i];
      const std::uint16_t* kept = draws_.draw(i, first, count, kept_[0].of);
      const Cuts::Bounds bounds = cuts_[i].next(differences_.codes(i), count, kept, kept_[0].of);
      select(x, differences_.codes(i), kept, bounds, count, invalid_.of);
      if (consensus_.inverse) {
        draws_.inverses(i, first, count, inverses_.of);
        multiply(x, inverses_.of, count);
      }
      std::fill(x + count, x + padded(), 0.0f);
    }
  }

  // Reads and combines a tile, in place if possible.
  std::int64_t combine(std::int64_t first, std::int64_t count, DType dtype, char* out) {
    const bool is_plain = dtype == DType::bf16 && cuts_.size() <= kMostInPlace && is_plain_bf16(base_) &&
                          std::all_of(operands_.begin(), operands_.end(), is_plain_bf16);
    const bool is_simple =
        !selection_.joint && !selection_.row_scales && !consensus_.inverse && consensus_.election != Election::count;
    if (is_plain && is_simple && count % kInPlace == 0 && combine_in_place(first, count, out)) return 0;
    read(first, count);
    Tile<float> result;
    differences_.read_base(first, count);
    add_values_any(chosen(), differences_.base(), invalid_.of, result.of);
    return narrow(result.of, count, dtype, out);
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
  // Returns false, and changes nothing but `out`, where elements of a code are on both sides of a cut, or where a
  // difference or a result is not finite.
  bool combine_in_place(std::int64_t first, std::int64_t count, char* out) {
    InPlace inputs[kMostInPlace];
    for (std::size_t i = 0; i < cuts_.size(); ++i)
      inputs[i] = {operands_[i].address + 2 * first,
                   draws_.draw(i, first, count, kept_[i].of),
                   cuts_[i].bounds(),
                   cuts_[i].upper(),
                   cuts_[i].lower(),
                   0,
                   0};
    const char* const base = base_.address + 2 * first;
    if (!arcmerge::combine_in_place(inputs, base, selection_.rounded, consensus_, count, out)) return false;
    for (std::size_t i = 0; i < cuts_.size(); ++i)
      if (cuts_[i].splits(inputs[i].with_upper, inputs[i].with_lower)) return false;
    for (std::size_t i = 0; i < cuts_.size(); ++i) cuts_[i].advance(inputs[i].with_upper, inputs[i].with_lower, count);
    return true;
  }

  std::int64_t padded() const { return (count_ + kLanes - 1) / kLanes * kLanes; }
  Chosen chosen() const { return {differences_.tiles(), consensus_, count_}; }

  const std::vector<Operand>& operands_;
  const Operand& base_;
  const Selection& selection_;
  const Consensus& consensus_;
  std::int64_t count_ = 0;
  Differences differences_;
  Draws draws_;
  std::vector<Cuts> cuts_;
  Tile<std::uint16_t> kept_[kMostInPlace];
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
  for (std::int64_t done = 0; done < count; done += kTile)
    nonfinite += selected.combine(first + done, std::min(kTile, count - done), out_dtype,
                                  static_cast<char*>(out) + done * item_size(out_dtype));
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
