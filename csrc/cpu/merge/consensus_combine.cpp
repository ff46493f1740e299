// consensus_combine: adds to a base the differences that are selected and that agree on a sign, and counts them.
#include <algorithm>
#include <cmath>

#include "cpu/merge/selection.h"
#include "cpu/simd/constants.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {
namespace {

// Which differences of an element agree, for the vote of an input and the sum of all votes.
struct Rule {
  bool elects, counts, zero_is_negative;

  explicit Rule(const Consensus& consensus)
      : elects(consensus.election != Election::none),
        counts(consensus.election == Election::count),
        zero_is_negative(consensus.zero_is_negative) {}

  ARCMERGE_INLINE float vote(float difference, float factor) const {
    const float vote = factor * difference;
    return counts ? float(vote > 0) - float(vote < 0) : vote;
  }
  ARCMERGE_INLINE bool agrees(float difference, float factor, float total) const {
    if (!elects) return difference != 0;
    const float vote = factor * difference;
    return (zero_is_negative ? total <= 0 : total < 0) ? vote < 0 : vote > 0;
  }
};

// Drops differences in place, and notes where one is not finite.
template <class>
ARCMERGE_INLINE void select_body(float* x, const std::uint32_t* codes, const std::uint16_t* kept, Cuts::Bounds bounds,
                                 std::int64_t count, std::uint32_t* nonfinite) {
  for (std::int64_t e = 0; e < count; ++e) {
    const std::int32_t code = std::int32_t(codes[e]);
    nonfinite[e] |= is_nonfinite(bits_of(x[e]));
    x[e] = float_of(kept[e] && code >= bounds.low && code <= bounds.high ? bits_of(x[e]) : 0);
  }
}

template <class>
ARCMERGE_INLINE void multiply_body(float* x, const float* factors, std::int64_t count) {
  // A dropped difference stays 0 where its factor is infinite.
  for (std::int64_t e = 0; e < count; ++e) x[e] = x[e] == 0 ? x[e] : x[e] * factors[e];
}

template <class>
ARCMERGE_INLINE void add_votes_body(float* total, const float* x, float factor, Rule rule, bool adds,
                                    std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e)
    total[e] = adds ? total[e] + rule.vote(x[e], factor) : rule.vote(x[e], factor);
}

template <class>
ARCMERGE_INLINE void count_agreeing_body(std::int32_t* agreeing, const float* x, const float* total, float factor,
                                         Rule rule, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) agreeing[e] += rule.agrees(x[e], factor, total[e]);
}

template <class>
ARCMERGE_INLINE void add_values_body(float* numerator, float* denominator, const float* x, const float* total,
                                     const std::int32_t* agreeing, const Consensus::Factors& factors, Rule rule,
                                     bool adds, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) {
    const bool agrees = rule.agrees(x[e], factors.vote, total[e]);
    const float value = (agreeing[e] == 1 ? factors.alone : factors.value) * x[e];
    const float added = agrees ? value : 0, share = agrees ? factors.share : 0;
    numerator[e] = adds ? numerator[e] + added : added;
    denominator[e] = adds ? denominator[e] + share : share;
  }
}

template <class>
ARCMERGE_INLINE void finish_body(float* out, const float* base, const float* numerator, const float* denominator,
                                 const std::uint32_t* nonfinite, float floor, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) {
    const float share = denominator[e];
    const float divisor = floor != 0 ? (share < floor ? floor : share) : (share == 0 ? 1 : share);
    const float result = base[e] + numerator[e] / divisor;
    out[e] = nonfinite[e] ? float_of(0x7fc00000) : result;
  }
}

template <class>
ARCMERGE_INLINE void add_squares_body(double* lanes, const float* x, std::int64_t padded) {
  for (std::int64_t e = 0; e < padded; e += kLanes)
    for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += double(x[e + lane]) * double(x[e + lane]);
}

template <class>
ARCMERGE_INLINE void count_roles_body(const std::int32_t* agreeing, const float* x, const float* total, float factor,
                                      Rule rule, std::int64_t count, std::int64_t& alone, std::int64_t& shared) {
  std::int32_t alone_here = 0, shared_here = 0;
  for (std::int64_t e = 0; e < count; ++e) {
    const bool agrees = rule.agrees(x[e], factor, total[e]);
    alone_here += agrees && agreeing[e] == 1;
    shared_here += agrees && agreeing[e] > 1;
  }
  alone += alone_here;
  shared += shared_here;
}

template <class>
ARCMERGE_INLINE std::int64_t balance_of_body(const float* total, std::int64_t count) {
  std::int32_t balance = 0;
  for (std::int64_t e = 0; e < count; ++e) balance += (total[e] > 0) - (total[e] < 0);
  return balance;
}

ARCMERGE_VARIANTS(void, select,
                  (float* x, const std::uint32_t* codes, const std::uint16_t* kept, Cuts::Bounds bounds,
                   std::int64_t count, std::uint32_t* nonfinite),
                  (x, codes, kept, bounds, count, nonfinite))
ARCMERGE_VARIANTS(void, multiply, (float* x, const float* factors, std::int64_t count), (x, factors, count))
ARCMERGE_VARIANTS(void, add_votes,
                  (float* total, const float* x, float factor, Rule rule, bool adds, std::int64_t count),
                  (total, x, factor, rule, adds, count))
ARCMERGE_VARIANTS(void, count_agreeing,
                  (std::int32_t* agreeing, const float* x, const float* total, float factor, Rule rule,
                   std::int64_t count),
                  (agreeing, x, total, factor, rule, count))
ARCMERGE_VARIANTS(void, add_values,
                  (float* numerator, float* denominator, const float* x, const float* total,
                   const std::int32_t* agreeing, const Consensus::Factors& factors, Rule rule, bool adds,
                   std::int64_t count),
                  (numerator, denominator, x, total, agreeing, factors, rule, adds, count))
ARCMERGE_VARIANTS(void, finish,
                  (float* out, const float* base, const float* numerator, const float* denominator,
                   const std::uint32_t* nonfinite, float floor, std::int64_t count),
                  (out, base, numerator, denominator, nonfinite, floor, count))
ARCMERGE_VARIANTS(void, add_squares, (double* lanes, const float* x, std::int64_t padded), (lanes, x, padded))
ARCMERGE_VARIANTS(void, count_roles,
                  (const std::int32_t* agreeing, const float* x, const float* total, float factor, Rule rule,
                   std::int64_t count, std::int64_t& alone, std::int64_t& shared),
                  (agreeing, x, total, factor, rule, count, alone, shared))
ARCMERGE_VARIANTS(std::int64_t, balance_of, (const float* total, std::int64_t count), (total, count))

// The tiles of a range: the selected differences of all inputs, the sum of their votes, how many of them agree.
class Votes {
 public:
  Votes(const std::vector<Operand>& operands, const Operand& base, const Selection& selection,
        const Consensus& consensus, const std::vector<EqualsBefore>& before)
      : consensus_(consensus),
        rule_(consensus),
        differences_(operands, base, selection),
        draws_(operands, base, selection) {
    for (std::size_t i = 0; i < operands.size(); ++i) cuts_.emplace_back(selection.cuts[i], before[i]);
  }

  void read(std::int64_t first, std::int64_t count) {
    count_ = count;
    differences_.read(first, count);
    std::fill(nonfinite_.of, nonfinite_.of + count, 0);
    std::fill(agreeing_.of, agreeing_.of + count, 0);
    std::fill(total_.of, total_.of + count, 0.0f);
    for (std::size_t i = 0; i < size(); ++i) {
      float* x = differences_[i];
      draws_.draw(i, first, count, kept_.of);
      const Cuts::Bounds bounds = cuts_[i].next(differences_.codes(i), count, kept_.of);
      select(x, differences_.codes(i), kept_.of, bounds, count, nonfinite_.of);
      if (consensus_.inverse) {
        draws_.inverses(i, first, count, inverses_.of);
        multiply(x, inverses_.of, count);
      }
      if (rule_.elects) add_votes(total_.of, x, consensus_.factors[i].vote, rule_, i > 0, count);
    }
    for (std::size_t i = 0; i < size(); ++i)
      count_agreeing(agreeing_.of, differences_[i], total_.of, consensus_.factors[i].vote, rule_, count);
  }

  std::int64_t combine(char* out, DType dtype) {
    Tile<float> numerator, denominator;
    for (std::size_t i = 0; i < size(); ++i)
      add_values(numerator.of, denominator.of, differences_[i], total_.of, agreeing_.of, consensus_.factors[i], rule_,
                 i > 0, count_);
    finish(numerator.of, differences_.base(), numerator.of, denominator.of, nonfinite_.of, consensus_.floor, count_);
    return narrow(numerator.of, count_, dtype, out);
  }

  void sum(std::vector<double>& lanes, ConsensusSums& sums) {
    const std::int64_t padded = (count_ + kLanes - 1) / kLanes * kLanes;
    for (std::size_t i = 0; i < size(); ++i) {
      float* x = differences_[i];
      std::fill(x + count_, x + padded, 0.0f);
      add_squares(&lanes[i * kLanes], x, padded);
      count_roles(agreeing_.of, x, total_.of, consensus_.factors[i].vote, rule_, count_, sums.alone[i], sums.shared[i]);
    }
    sums.balance += balance_of(total_.of, count_);
  }

 private:
  std::size_t size() const { return cuts_.size(); }

  const Consensus& consensus_;
  const Rule rule_;
  std::int64_t count_ = 0;
  Differences differences_;
  Draws draws_;
  std::vector<Cuts> cuts_;
  Tile<std::uint16_t> kept_;
  Tile<float> total_, inverses_;
  Tile<std::int32_t> agreeing_;
  Tile<std::uint32_t> nonfinite_;
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
  Votes votes(operands, base, selection, consensus, before);
  std::int64_t nonfinite = 0;
  for (std::int64_t done = 0; done < count; done += kTile) {
    votes.read(first + done, std::min(kTile, count - done));
    nonfinite += votes.combine(static_cast<char*>(out) + done * item_size(out_dtype), out_dtype);
  }
  return nonfinite;
}

ConsensusSums consensus_sums(const std::vector<Operand>& operands, const Operand& base, const Selection& selection,
                             const Consensus& consensus, const std::vector<EqualsBefore>& before, std::int64_t first,
                             std::int64_t count) {
  require_consensus(operands, selection, consensus, before, first, count);
  const std::size_t k = operands.size();
  ConsensusSums sums{std::vector<double>(k), std::vector<std::int64_t>(k), std::vector<std::int64_t>(k)};
  std::vector<double> lanes(k * kLanes);
  Votes votes(operands, base, selection, consensus, before);
  for (std::int64_t done = 0; done < count; done += kTile) {
    votes.read(first + done, std::min(kTile, count - done));
    votes.sum(lanes, sums);
  }
  for (std::size_t i = 0; i < k; ++i)
    for (std::int64_t lane = 0; lane < kLanes; ++lane) sums.squares[i] += lanes[i * kLanes + lane];
  return sums;
}

}  // namespace arcmerge
