#include "cpu/selection/row_masks.h"

#include <algorithm>
#include <cstring>

#include "cpu/selection/uniform16.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

constexpr std::int64_t kCodes = 1 << 15;
// More elements than this are ranked in one go.
constexpr std::int64_t kFew = 16;

template <class>
ARCMERGE_INLINE void halve_body(const std::uint32_t* codes, std::int64_t count, std::uint16_t* halves) {
  for (std::int64_t e = 0; e < count; ++e) halves[e] = std::uint16_t(codes[e] >> 16);
}

// The smallest code that is not 0, less 1, and the largest code.
template <class>
ARCMERGE_INLINE void range_of_body(const std::uint16_t* codes, std::int64_t count, std::uint16_t* range) {
  std::uint16_t below = 0xffff, largest = 0;
  for (std::int64_t e = 0; e < count; ++e) {
    below = std::min<std::uint16_t>(below, codes[e] - 1);
    largest = std::max(largest, codes[e]);
  }
  range[0] = below;
  range[1] = largest;
}

// The rank from which on an element of each number is kept, +-1.
template <class>
ARCMERGE_INLINE void thresholds_of_body(const std::uint16_t* numbers, std::int64_t count, float scale, float offset,
                                        std::int32_t* thresholds) {
  for (std::int64_t e = 0; e < count; ++e)
    thresholds[e] = std::int32_t(float(std::int32_t(numbers[e])) * scale - offset);
}

template <class>
ARCMERGE_INLINE std::int32_t count_equal16_body(const std::uint16_t* codes, std::uint16_t code, std::int64_t count) {
  std::int32_t equal = 0;
  for (std::int64_t e = 0; e < count; ++e) equal += codes[e] == code;
  return equal;
}

ARCMERGE_VARIANTS(void, halve, (const std::uint32_t* codes, std::int64_t count, std::uint16_t* halves),
                  (codes, count, halves))
ARCMERGE_VARIANTS(void, range_of, (const std::uint16_t* codes, std::int64_t count, std::uint16_t* range),
                  (codes, count, range))
ARCMERGE_VARIANTS(void, thresholds_of,
                  (const std::uint16_t* numbers, std::int64_t count, float scale, float offset,
                   std::int32_t* thresholds),
                  (numbers, count, scale, offset, thresholds))
ARCMERGE_VARIANTS(std::int32_t, count_equal16, (const std::uint16_t* codes, std::uint16_t code, std::int64_t count),
                  (codes, code, count))

}  // namespace

bool RowMasks::has(const Selection& selection) {
  // Thresholds of f32 are off by less than 1 up to this one.
  constexpr double kMost = 1 << 20;
  return selection.rounded && std::all_of(selection.probabilities.begin(), selection.probabilities.end(),
                                          [&](const std::pair<double, double>& each) {
                                            const auto [smallest, largest] = each;
                                            return smallest == largest ||
                                                   double(selection.columns) <= kMost * (largest - smallest);
                                          });
}

RowMasks::RowMasks(const std::vector<Operand>& operands, const Operand& base, const Selection& selection)
    : selection_(selection), differences_(operands, base, selection), rows_(operands.size()) {}

const std::uint16_t* RowMasks::of(std::size_t i, std::int64_t row) {
  if (row != row_) read(row);
  if (!rows_[i].masked) mask(i, row);
  return rows_[i].kept.data();
}

void RowMasks::read(std::int64_t row) {
  const std::int64_t columns = selection_.columns;
  for (Row& each : rows_) {
    each.codes.resize(columns);
    each.kept.resize(columns);
    each.masked = false;
  }
  for (std::int64_t done = 0; done < columns; done += kTile) {
    const std::int64_t size = std::min(kTile, columns - done);
    differences_.read(row * columns + done, size);
    for (std::size_t i = 0; i < rows_.size(); ++i) halve(differences_.codes(i), size, rows_[i].codes.data() + done);
  }
  row_ = row;
}

// Counts all codes in firsts_. The two halves of a row have counters of their own, because an addition in memory waits
// for the one before it in the same place.
void RowMasks::count(const std::vector<std::uint16_t>& codes) {
  if (counts_.empty()) {
    counts_.assign(2 * kCodes + 16, 0);
    firsts_.assign(kCodes + 2, 0);
  }
  const std::int64_t size = std::int64_t(codes.size()), half = size / 2;
  std::int32_t *const first = counts_.data(), *const second = first + kCodes + 16;
  for (std::int64_t e = 0; e < half; ++e) {
    ++first[codes[e]];
    ++second[codes[half + e]];
  }
  if (size % 2) ++second[codes[size - 1]];
  std::uint16_t range[2];
  range_of(codes.data(), size, range);
  std::int32_t total = 0;
  const auto add = [&](std::int64_t code) {
    firsts_[code] = total;
    total += first[code] + second[code];
    first[code] = second[code] = 0;
  };
  add(0);
  firsts_[1] = total;
  for (std::int64_t code = std::int64_t(range[0]) + 1; code <= range[1]; ++code) add(code);
  firsts_[range[1] + 1] = total;
}

void RowMasks::mask(std::size_t i, std::int64_t row) {
  const std::int64_t columns = selection_.columns;
  Row& here = rows_[i];
  const std::uint16_t* const codes = rows_[selection_.joint ? 0 : i].codes.data();
  count(rows_[selection_.joint ? 0 : i].codes);
  const std::uint16_t* const numbers = uniform16(selection_.keys[i], row * columns, columns, numbers_);
  const auto [smallest, largest] = selection_.probabilities[i];
  const double step = (largest - smallest) / double(columns - 1);
  thresholds_.resize(columns);
  undecided_.resize(columns + 1);
  // u + 0.5 < 65536 (smallest + step * rank)
  thresholds_of(numbers, columns, float(1 / (65536 * step)), float((smallest - 0.5 / 65536) / step),
                thresholds_.data());
  std::int64_t undecided = 0;
  for (std::int64_t e = 0; e < columns; ++e) {
    std::int32_t ranks[2];
    std::memcpy(ranks, firsts_.data() + codes[e], sizeof ranks);
    const bool keeps = ranks[0] > thresholds_[e] + 2, drops = ranks[1] < thresholds_[e] - 1;
    here.kept[e] = std::uint16_t(keeps << 15);
    undecided_[undecided] = std::int32_t(e);
    undecided += !keeps & !drops;
  }
  const auto decide = [&](std::int64_t e, std::int32_t rank) {
    const double limit = 65536 * (smallest + step * double(rank));
    here.kept[e] = double(std::int32_t(numbers[e])) + 0.5 < limit ? kKept : 0;
  };
  if (undecided <= kFew) {
    for (std::int64_t n = 0; n < undecided; ++n) {
      const std::int32_t e = undecided_[n];
      decide(e, firsts_[codes[e]] + count_equal16(codes, codes[e], e));
    }
  } else {
    for (std::int64_t e = 0, n = 0; n < undecided; ++e) {
      const std::int32_t rank = firsts_[codes[e]]++;
      if (e == undecided_[n]) decide(undecided_[n++], rank);
    }
  }
  here.masked = true;
}

}  // namespace arcmerge
