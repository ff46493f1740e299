#include "cpu/selection/row_masks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "cpu/selection/uniform16.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

// The highest bits of 64 lanes, the first of which is the lowest one of the result.
std::uint64_t highest_bits(const std::uint16_t* lanes) {
  std::uint64_t bits = 0;
  for (int group = 0; group < 16; ++group) {
    std::uint64_t four;
    std::memcpy(&four, lanes + 4 * group, sizeof four);
    // The product has the bits of the four lanes in bits 48 to 51.
    bits |= ((four >> 15 & 0x0001000100010001) * 0x0001000200040008 >> 48 & 15) << 4 * group;
  }
  return bits;
}

constexpr std::int64_t kCodes = 1 << 15;
// Not a multiple of 4096 bytes, because a load waits for a store to an address with equal last bits.
constexpr std::int64_t kStride = kCodes + 272;
// More elements than this are ranked in one go.
constexpr std::int64_t kFew = 64;

// The codes of differences of bf16 operands in place.
template <class Isa>
ARCMERGE_INLINE void codes_of_bf16_body(const char* x, const char* base, std::int64_t count, std::uint16_t* codes) {
  using U32 = typename Vector<Isa>::U32;
  typedef std::int16_t I16 __attribute__((vector_size(Isa::kBytes)));
  constexpr std::int64_t kStep = Isa::kBytes / 2;
  const auto step = [](const char* x, const char* base) ARCMERGE_LAMBDA {
    U32 x_words, base_words;
    std::memcpy(&x_words, x, sizeof x_words);
    std::memcpy(&base_words, base, sizeof base_words);
    const I16 found = (I16)rounded_codes_of_words<Isa>(x_words, base_words);
    return found > std::int16_t(0x7f80) ? I16{} + std::int16_t(0x7fc0) : found;  // one code for all NaNs
  };
  std::int64_t e = 0;
  for (; e + kStep <= count; e += kStep) {
    const I16 found = step(x + 2 * e, base + 2 * e);
    std::memcpy(codes + e, &found, sizeof found);
  }
  if (e == count) return;
  char last_x[2 * kStep] = {}, last_base[2 * kStep] = {};
  std::memcpy(last_x, x + 2 * e, 2 * (count - e));
  std::memcpy(last_base, base + 2 * e, 2 * (count - e));
  const I16 found = step(last_x, last_base);
  std::memcpy(codes + e, &found, 2 * (count - e));
}

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

// kept: kKept for numbers below `first`; open: the same for those from it on to `last`. A range of zero elements has
// first > last.
template <class>
ARCMERGE_INLINE void divide_body(const std::uint16_t* numbers, std::int32_t first, std::int32_t last,
                                 std::int64_t count, std::uint16_t* kept, std::uint16_t* open) {
  const auto width = std::uint16_t(last - first);
  const auto low = std::uint16_t(first);
  const std::uint16_t all = first > 0xffff ? kKept : 0, some = first > last ? 0 : kKept;
  for (std::int64_t e = 0; e < count; ++e) {
    kept[e] = numbers[e] < low ? kKept : all;
    open[e] = std::uint16_t(numbers[e] - low) <= width ? some : 0;
  }
}

// Adds up the counts of four quarters, of which the last become 0.
template <class>
ARCMERGE_INLINE void accumulate_body(std::int32_t* counts, std::int64_t stride, std::int64_t count,
                                     std::int32_t* sums) {
  std::int32_t *const second = counts + stride, *const third = second + stride, *const last = third + stride;
  for (std::int64_t i = 0; i < count; ++i) {
    second[i] += counts[i];
    third[i] += second[i];
    sums[i] = third[i] + last[i];
    last[i] = 0;
  }
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
  for (std::int64_t done = 0; done < count; done += 0x8000) {
    std::uint16_t some = 0;
    for (std::int64_t e = done; e < std::min<std::int64_t>(count, done + 0x8000); ++e) some += codes[e] == code;
    equal += some;
  }
  return equal;
}

ARCMERGE_VARIANTS(void, codes_of_bf16, (const char* x, const char* base, std::int64_t count, std::uint16_t* codes),
                  (x, base, count, codes))
ARCMERGE_VARIANTS(void, halve, (const std::uint32_t* codes, std::int64_t count, std::uint16_t* halves),
                  (codes, count, halves))
ARCMERGE_VARIANTS(void, range_of, (const std::uint16_t* codes, std::int64_t count, std::uint16_t* range),
                  (codes, count, range))
ARCMERGE_VARIANTS(void, divide,
                  (const std::uint16_t* numbers, std::int32_t first, std::int32_t last, std::int64_t count,
                   std::uint16_t* kept, std::uint16_t* open),
                  (numbers, first, last, count, kept, open))
ARCMERGE_VARIANTS(void, accumulate, (std::int32_t* counts, std::int64_t stride, std::int64_t count, std::int32_t* sums),
                  (counts, stride, count, sums))
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
    : operands_(operands),
      base_(base),
      selection_(selection),
      in_place_(!selection.joint && !selection.row_scales && is_plain_bf16(base) &&
                std::all_of(operands.begin(), operands.end(), is_plain_bf16)),
      differences_(operands, base, selection),
      rows_(operands.size()) {}

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
  for (std::size_t i = 0; in_place_ && i < rows_.size(); ++i)
    codes_of_bf16(operands_[i].address + 2 * row * columns, base_.address + 2 * row * columns, columns,
                  rows_[i].codes.data());
  for (std::int64_t done = 0; !in_place_ && done < columns; done += kTile) {
    const std::int64_t size = std::min(kTile, columns - done);
    differences_.read(row * columns + done, size);
    for (std::size_t i = 0; i < rows_.size(); ++i) halve(differences_.codes(i), size, rows_[i].codes.data() + done);
  }
  row_ = row;
}

// Counts all codes. The quarters of a row have counters of their own, because an addition in memory waits for the one
// before it in the same place, and because equal elements before an element are counted from its quarter on.
void RowMasks::count(const std::vector<std::uint16_t>& codes) {
  if (counts_.empty()) {
    counts_.assign(4 * kStride, 0);
    firsts_.assign(kCodes + 2, 0);
  }
  for (std::int64_t quarter = 0; quarter < 3; ++quarter) {
    std::int32_t* const last = counts_.data() + quarter * kStride;
    last[0] = 0;
    std::fill(last + smallest_, last + after_, 0);
  }
  const std::int64_t size = std::int64_t(codes.size()), length = size / 4;
  std::int32_t* const counts = counts_.data();
  for (std::int64_t e = 0; e < length; ++e)
    for (std::int64_t quarter = 0; quarter < 4; ++quarter) ++counts[quarter * kStride + codes[quarter * length + e]];
  for (std::int64_t e = 4 * length; e < size; ++e) ++counts[3 * kStride + codes[e]];
  std::uint16_t range[2];
  range_of(codes.data(), size, range);
  after_ = std::int64_t(range[1]) + 1;
  smallest_ = std::min(std::int64_t(range[0]) + 1, after_);
  accumulate(counts, kStride, 1, firsts_.data());
  accumulate(counts + smallest_, kStride, after_ - smallest_, firsts_.data() + smallest_);
  std::int32_t total = std::exchange(firsts_[0], 0);
  if (smallest_ > 1) firsts_[1] = total;
  for (std::int64_t code = smallest_; code < after_; ++code) total += std::exchange(firsts_[code], total);
  firsts_[after_] = total;
}

// How many elements before element e of the row that was counted last have its code.
std::int32_t RowMasks::equal_before(const std::vector<std::uint16_t>& codes, std::int64_t e) const {
  const std::int64_t length = std::int64_t(codes.size()) / 4;
  const std::int64_t quarter = length ? std::min<std::int64_t>(e / length, 3) : 3;
  const std::int32_t found = quarter ? counts_[(quarter - 1) * kStride + codes[e]] : 0;
  return found + count_equal16(codes.data() + quarter * length, codes[e], e - quarter * length);
}

void RowMasks::mask(std::size_t i, std::int64_t row) {
  const std::int64_t columns = selection_.columns;
  Row& here = rows_[i];
  const std::vector<std::uint16_t>& codes = rows_[selection_.joint ? 0 : i].codes;
  count(codes);
  const std::uint16_t* const numbers = uniform16(selection_.keys[i], row * columns, columns, numbers_);
  const auto [smallest, largest] = selection_.probabilities[i];
  const double step = (largest - smallest) / double(columns - 1);
  // An element of rank r is kept if its number u has u + 0.5 < 65536 (smallest + step * r).
  const auto limit = [&](std::int64_t rank) { return 65536 * (smallest + step * double(rank)); };
  const auto kept_below = [&](std::int64_t rank) { return std::int32_t(std::ceil(limit(rank) - 0.5)); };
  const std::int64_t padded = (columns + 63) / 64 * 64;
  open_.assign(padded, 0);
  undecided_.resize(columns + 1);
  thresholds_.resize(columns);
  divide(numbers, std::max(kept_below(0), 0), std::min(kept_below(columns - 1), 0x10000) - 1, columns, here.kept.data(),
         open_.data());
  thresholds_of(numbers, columns, float(1 / (65536 * step)), float((smallest - 0.5 / 65536) / step),
                thresholds_.data());
  std::int64_t undecided = 0;
  for (std::int64_t done = 0; done < padded; done += 64)
    for (std::uint64_t bits = highest_bits(open_.data() + done); bits != 0; bits &= bits - 1) {
      const std::int64_t e = done + __builtin_ctzll(bits);
      const std::int32_t threshold = thresholds_[e];
      std::int32_t ranks[2];
      std::memcpy(ranks, firsts_.data() + codes[e], sizeof ranks);
      const bool keeps = ranks[0] > threshold + 2, drops = ranks[1] < threshold - 1;
      here.kept[e] = std::uint16_t(keeps << 15);
      undecided_[undecided] = std::int32_t(e);
      undecided += !keeps & !drops;
    }
  const auto decide = [&](std::int64_t e, std::int32_t rank) {
    here.kept[e] = double(std::int32_t(numbers[e])) + 0.5 < limit(rank) ? kKept : 0;
  };
  if (undecided <= kFew) {
    for (std::int64_t n = 0; n < undecided; ++n) {
      const std::int32_t e = undecided_[n];
      decide(e, firsts_[codes[e]] + equal_before(codes, e));
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
