// The operations of merge.h that select elements, as native_merge.cpp calls the others: in place, and by rows in
// ranges. Both must give the bits of plain loops.
#include <numeric>
#include <utility>

#include "operands.h"

namespace fuzz {
namespace {

using arcmerge::Consensus;
using arcmerge::Election;
using arcmerge::EqualsBefore;
using arcmerge::Selection;

// The number of element e, from a plain Philox-4x32-10.
std::uint32_t uniform16(std::uint64_t key, Count e) {
  std::uint32_t c[4] = {std::uint32_t(e / 8), std::uint32_t(std::uint64_t(e / 8) >> 32), 0, 0};
  std::uint32_t low = std::uint32_t(key), high = std::uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round, low += 0x9e3779b9, high += 0xbb67ae85) {
    const std::uint64_t first = std::uint64_t(0xd2511f53) * c[0], third = std::uint64_t(0xcd9e8d57) * c[2];
    const std::uint32_t next[4] = {std::uint32_t(third >> 32) ^ c[1] ^ low, std::uint32_t(third),
                                   std::uint32_t(first >> 32) ^ c[3] ^ high, std::uint32_t(first)};
    std::copy(next, next + 4, c);
  }
  return c[e % 8 / 2] >> e % 2 * 16 & 0xffff;
}

// A call, and by element and input: differences, codes, probabilities, and whether random numbers keep elements.
struct Selected {
  const Case of;
  Selection selection;
  std::vector<float> scales;
  std::vector<std::vector<float>> differences;
  std::vector<std::vector<std::uint32_t>> codes;
  std::vector<std::vector<double>> chances;
  std::vector<std::vector<bool>> kept;

  explicit Selected(Input& in) : of(in, true) {
    const Count k = of.k(), all = of.rows * of.columns;
    selection.columns = of.columns;
    selection.joint = in.byte() % 4 == 0;
    selection.rounded = in.flag();
    if (in.byte() % 4 == 0) {
      for (Count row = 0; row < of.rows; ++row) scales.push_back(float(in.byte()) / 16);
      selection.row_scales = scales.data();
    }
    for (Count i = 0; i < k; ++i) {
      const double p = double(in.byte()) / 200, q = in.flag() ? double(in.byte()) / 255 : p;
      selection.keys.push_back(in.random());
      selection.probabilities.emplace_back(p, q);
      differences.emplace_back(all);
      codes.emplace_back(all);
      chances.emplace_back(all);
      kept.emplace_back(all);
      for (Count e = 0; e < all; ++e) differences[i][e] = of.value(i, e);
    }
    for (Count i = 0; i < k; ++i)
      for (Count e = 0; e < all; ++e) codes[i][e] = code(i, e);
    for (Count i = 0; i < k; ++i)
      for (Count row = 0; row < of.rows; ++row) draw(i, row * of.columns);
    for (Count i = 0; i < k; ++i) selection.cuts.push_back(cut(in, i));
  }

  std::uint32_t code(Count i, Count e) const {
    float magnitude = std::fabs(differences[i][e]);
    if (selection.joint) {
      const float k = float(of.k());
      float mean = differences[0][e], variance = 0;
      for (Count j = 1; j < of.k(); ++j) mean += differences[j][e];
      mean /= k;
      for (Count j = 0; j < of.k(); ++j) {
        const float square = (differences[j][e] - mean) * (differences[j][e] - mean);
        variance = j == 0 ? square : variance + square;
      }
      magnitude = variance / k;
    }
    if (selection.row_scales) magnitude *= scales[e / of.columns];
    if (selection.rounded) magnitude = rounded(magnitude, DType::bf16);
    std::uint32_t bits;
    std::memcpy(&bits, &magnitude, 4);
    return std::isnan(magnitude) ? 0x7fc00000 : bits & 0x7fffffff;
  }

  void draw(Count i, Count first) {
    const auto [smallest, largest] = selection.probabilities[i];
    std::vector<Count> order(of.columns);
    std::iota(order.begin(), order.end(), first);
    std::stable_sort(order.begin(), order.end(), [&](Count a, Count b) { return codes[i][a] < codes[i][b]; });
    const double step = (largest - smallest) / double(of.columns - 1);
    for (Count rank = 0; rank < of.columns; ++rank) {
      const Count e = order[rank];
      chances[i][e] =
          of.columns == 1 || smallest == largest ? (smallest + largest) / 2 : smallest + step * double(rank);
      kept[i][e] = double(uniform16(selection.keys[i], e)) + 0.5 < 65536 * chances[i][e];
    }
  }

  Selection::Cut cut(Input& in, Count i) const {
    if (codes[i].empty() || in.byte() % 4 == 0) return {0x7fffffff, 0, 0, Count(1) << 62};
    const auto any = [&] { return Count(codes[i][in.random() % codes[i].size()]); };
    const auto [lower, upper] = std::minmax({any(), any()});
    return {upper, in.count(9), lower, in.count(30)};
  }

  // How many elements before e have a code.
  Count equals(Count i, Count code, Count e) const { return std::count(codes[i].begin(), codes[i].begin() + e, code); }
  std::vector<EqualsBefore> before(Count e) const {
    std::vector<EqualsBefore> counts;
    for (Count i = 0; i < of.k(); ++i)
      counts.emplace_back(equals(i, selection.cuts[i].upper, e), equals(i, selection.cuts[i].lower, e));
    return counts;
  }
  bool between(Count i, Count e) const {
    const auto& [upper, upper_rank, lower, lower_rank] = selection.cuts[i];
    const Count code = codes[i][e];
    return (code < upper || (code == upper && equals(i, upper, e) >= upper_rank)) &&
           (code > lower || (code == lower && equals(i, lower, e) < lower_rank));
  }

  // Calls f(operands, base, first, count) for all elements at once, and for ranges of them.
  template <class F>
  void twice(Input& in, const F& f) const {
    use_any_variant(in);
    f(of.whole, of.base->in_place(), of.first, of.count, false);
    use_any_variant(in);
    const Count piece = 1 + in.count(of.count);
    for (Count done = 0; done < of.count; done += piece)
      f(of.parts, of.base->by_rows(), of.first + done, std::min(piece, of.count - done), true);
  }
};

void histogram(Input& in) {
  const Selected selected(in);
  const Case& of = selected.of;
  const Count planes = selected.selection.rounded ? 2 : 4, size = of.k() * planes * 32768;
  std::vector<Count> expected(size), whole(size), parts(size);
  for (Count i = 0; i < of.k(); ++i)
    for (Count e = of.first; e < of.first + of.count; ++e) {
      const std::uint32_t code = selected.codes[i][e];
      Count* bin = &expected[(i * planes + selected.kept[i][e]) * 32768 + (code >> 16)];
      ++*bin;
      if (planes == 4) bin[2 * 32768] += code & 0xffff;
    }
  selected.twice(in, [&](const auto& operands, const Operand& base, Count first, Count count, bool in_parts) {
    arcmerge::magnitude_histogram((in_parts ? parts : whole).data(), operands, base, selected.selection, first, count);
  });
  require(whole == expected, "magnitude_histogram");
  require(parts == expected, "magnitude_histogram in parts");
}

void histogram_within(Input& in) {
  const Selected selected(in);
  const Case& of = selected.of;
  const Count chosen = in.below(3);
  std::vector<std::vector<Count>> prefixes(of.k());
  std::vector<Count> expected(of.k() * chosen * 65536), whole(expected.size()), parts(expected.size());
  for (Count i = 0; i < of.k(); ++i)
    for (Count p = 0; p < chosen; ++p) {
      const auto& codes = selected.codes[i];
      prefixes[i].push_back(codes.empty() || in.flag() ? in.below(200) : codes[in.random() % codes.size()] >> 16);
      for (Count e = of.first; e < of.first + of.count; ++e)
        expected[(i * chosen + p) * 65536 + (codes[e] & 0xffff)] += codes[e] >> 16 == prefixes[i][p];
    }
  selected.twice(in, [&](const auto& operands, const Operand& base, Count first, Count count, bool in_parts) {
    arcmerge::magnitude_histogram_within((in_parts ? parts : whole).data(), operands, base, selected.selection,
                                         prefixes, first, count);
  });
  require(whole == expected, "magnitude_histogram_within");
  require(parts == expected, "magnitude_histogram_within in parts");
}

// What an input adds to an element, and whether it agrees.
struct Part {
  float difference, vote;
  bool agrees;
};

void consensus(Input& in) {
  const Selected selected(in);
  const Case& of = selected.of;
  const Count k = of.k();
  Consensus consensus;
  consensus.election = Election(in.below(3));
  consensus.zero_is_negative = in.flag();
  consensus.floor = in.flag() ? 0 : float(in.byte()) / 64;
  consensus.inverse = in.byte() % 4 == 0;
  for (Count i = 0; i < k; ++i) {
    const auto factor = [&] { return float(int(in.byte()) - 100) / 32; };
    consensus.factors.push_back({factor(), factor(), factor(), factor()});
  }
  const DType dtype = in.dtype();
  const Count size = arcmerge::item_size(dtype);
  const Memory expected(of.count * size), whole(of.count * size), parts(of.count * size);
  arcmerge::ConsensusSums sums{{}, std::vector<Count>(k), std::vector<Count>(k), 0};
  std::vector<double> lanes(k * 16);
  bool is_defined = true;
  Count nonfinite = 0;
  for (Count at = 0; at < of.count; ++at) {
    const Count e = of.first + at;
    std::vector<Part> inputs(k);
    bool finite = true;
    float total = 0;
    for (Count i = 0; i < k; ++i) {
      Part& part = inputs[i];
      finite = finite && std::isfinite(selected.differences[i][e]);
      part.difference = selected.kept[i][e] && selected.between(i, e) ? selected.differences[i][e] : 0;
      if (consensus.inverse && part.difference != 0) part.difference *= float(1 / selected.chances[i][e]);
      part.vote = consensus.factors[i].vote * part.difference;
      const float counted =
          consensus.election == Election::count ? float(part.vote > 0) - float(part.vote < 0) : part.vote;
      total = i == 0 ? counted : total + counted;
      lanes[i * 16 + at % 16] += double(part.difference) * double(part.difference);
    }
    is_defined = is_defined && finite;
    const bool negative = consensus.zero_is_negative ? total <= 0 : total < 0;
    Count agreeing = 0;
    for (Part& part : inputs)
      agreeing += part.agrees = consensus.election == Election::none ? part.difference != 0
                                : negative                           ? part.vote < 0
                                                                     : part.vote > 0;
    float numerator = 0, denominator = 0;
    for (Count i = 0; i < k; ++i) {
      const auto& [vote, value, share, alone] = consensus.factors[i];
      const float added = inputs[i].agrees ? (agreeing == 1 ? alone : value) * inputs[i].difference : 0;
      numerator = i == 0 ? added : numerator + added;
      denominator = i == 0 ? (inputs[i].agrees ? share : 0) : denominator + (inputs[i].agrees ? share : 0);
      (agreeing == 1 ? sums.alone : sums.shared)[i] += inputs[i].agrees;
    }
    if (consensus.election != Election::none) sums.balance += (total > 0) - (total < 0);
    if (consensus.floor != 0)
      denominator = denominator < consensus.floor ? consensus.floor : denominator;
    else
      denominator = denominator == 0 ? 1 : denominator;
    const float result = (*of.base)[e] + numerator / denominator;
    put_value(expected.address, dtype, at, finite ? result : std::numeric_limits<float>::quiet_NaN());
    nonfinite += !std::isfinite(value_of(expected.address, dtype, at));
  }
  Count found[2] = {};
  selected.twice(in, [&](const auto& operands, const Operand& base, Count first, Count count, bool in_parts) {
    char* out = (in_parts ? parts : whole).address + (first - of.first) * size;
    found[in_parts] += arcmerge::consensus_combine(out, dtype, operands, base, selected.selection, consensus,
                                                   selected.before(first), first, count);
    if (in_parts) return;
    const auto counted =
        arcmerge::consensus_sums(operands, base, selected.selection, consensus, selected.before(first), first, count);
    if (!is_defined) return;
    require(counted.alone == sums.alone && counted.shared == sums.shared, "consensus_sums: roles");
    require(counted.balance == sums.balance, "consensus_sums: balance");
    for (Count i = 0; i < k; ++i)
      require(same(counted.squares[i], std::accumulate(&lanes[i * 16], &lanes[i * 16] + 16, 0.0)), "consensus_sums");
  });
  require(whole == expected, "consensus_combine");
  require(parts == expected, "consensus_combine in parts");
  require(found[0] == nonfinite && found[1] == nonfinite, "consensus_combine: how many are not finite");
}

void divergences(Input& in) {
  const Case of(in, true);
  std::vector<float> whole(of.rows), parts(of.rows);
  use_any_variant(in);
  arcmerge::row_divergences(whole.data(), of.whole[0], of.base->in_place(), of.columns, 0, of.rows);
  use_any_variant(in);
  for (Count row = 0; row < of.rows; ++row)
    arcmerge::row_divergences(&parts[row], of.parts[0], of.base->by_rows(), of.columns, row, 1);
  for (Count row = 0; row < of.rows; ++row) {
    bool finite = true;
    for (Count e = row * of.columns; e < (row + 1) * of.columns; ++e)
      finite = finite && std::isfinite(of.sources[0][e]) && std::isfinite((*of.base)[e]);
    require(same(whole[row], parts[row]), "row_divergences in parts");
    require(!finite ? std::isnan(whole[row]) : !(whole[row] < 0), "row_divergences");
  }
}

}  // namespace

void selection_operation(Input& in) {
  constexpr void (*kOperations[])(Input&) = {histogram, histogram_within, consensus, divergences};
  kOperations[in.below(std::size(kOperations))](in);
}

}  // namespace fuzz
