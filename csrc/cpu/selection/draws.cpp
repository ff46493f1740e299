#include "cpu/selection/draws.h"

#include <algorithm>
#include <cmath>

#include "cpu/selection/mask_bits.h"
#include "cpu/selection/uniform16.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

template <class>
ARCMERGE_INLINE void keep_below_body(const std::uint16_t* numbers, std::uint32_t limit, std::int64_t count,
                                     std::uint16_t* kept) {
  const std::uint16_t last = std::uint16_t(limit - 1);
  for (std::int64_t e = 0; e < count; ++e) kept[e] = limit > 0 && numbers[e] <= last ? kKept : 0;
}
// Keys in the order of codes: 0 for a code of 0, and from 1 on for others. Returns the largest.
template <class>
ARCMERGE_INLINE std::uint32_t keys_of_body(const std::uint32_t* codes, int shift, std::int64_t count,
                                           std::uint32_t* keys) {
  std::uint32_t below = ~0u, largest = 0;  // the smallest code that is not 0, less 1
  for (std::int64_t e = 0; e < count; ++e) {
    below = std::min(below, codes[e] - 1);
    largest = std::max(largest, codes[e]);
  }
  const std::uint32_t origin = (below + 1) >> shift;
  for (std::int64_t e = 0; e < count; ++e) keys[e] = codes[e] == 0 ? 0 : (codes[e] >> shift) - origin + 1;
  return largest == 0 ? 0 : (largest >> shift) - origin + 1;
}

template <class>
ARCMERGE_INLINE void keep_by_rank_body(const std::uint16_t* numbers, const std::int32_t* ranks, double first,
                                       double step, std::int64_t count, std::uint16_t* kept) {
  for (std::int64_t e = 0; e < count; ++e) {
    const double limit = 65536 * (first + step * double(ranks[e]));
    kept[e] = double(std::int32_t(numbers[e])) + 0.5 < limit ? kKept : 0;
  }
}
template <class>
ARCMERGE_INLINE void inverses_by_rank_body(const std::int32_t* ranks, double first, double step, std::int64_t count,
                                           float* out) {
  for (std::int64_t e = 0; e < count; ++e) out[e] = float(1 / (first + step * double(ranks[e])));
}

ARCMERGE_VARIANTS(void, keep_below,
                  (const std::uint16_t* numbers, std::uint32_t limit, std::int64_t count, std::uint16_t* kept),
                  (numbers, limit, count, kept))
ARCMERGE_VARIANTS(std::uint32_t, keys_of,
                  (const std::uint32_t* codes, int shift, std::int64_t count, std::uint32_t* keys),
                  (codes, shift, count, keys))
ARCMERGE_VARIANTS(void, keep_by_rank,
                  (const std::uint16_t* numbers, const std::int32_t* ranks, double first, double step,
                   std::int64_t count, std::uint16_t* kept),
                  (numbers, ranks, first, step, count, kept))
ARCMERGE_VARIANTS(void, inverses_by_rank,
                  (const std::int32_t* ranks, double first, double step, std::int64_t count, float* out),
                  (ranks, first, step, count, out))
}  // namespace

// ---- ranks

const std::int32_t* RowRanks::of(std::size_t i, std::int64_t row) {
  if (row != row_) read(row);
  return ranks_[selection_.joint ? 0 : i].data();
}

void RowRanks::read(std::int64_t row) {
  const std::int64_t columns = selection_.columns;
  const std::size_t ranked = selection_.joint ? 1 : differences_.size();
  for (std::size_t i = 0; i < ranked; ++i) codes_[i].resize(columns);
  for (std::int64_t done = 0; done < columns; done += kTile) {
    const std::int64_t size = std::min(kTile, columns - done);
    differences_.read(row * columns + done, size);
    for (std::size_t i = 0; i < ranked; ++i)
      std::copy(differences_.codes(i), differences_.codes(i) + size, codes_[i].begin() + done);
  }
  for (std::size_t i = 0; i < ranked; ++i) rank(codes_[i], ranks_[i]);
  row_ = row;
}

// A radix sort, the last pass of which writes ranks in place of an order. One pass is enough for most codes that are
// rounded, which are 0 or lie between a smallest and a largest one.
void RowRanks::rank(const std::vector<std::uint32_t>& codes, std::vector<std::int32_t>& ranks) {
  const std::int64_t count = std::int64_t(codes.size());
  ranks.resize(count);
  order_.resize(count);
  next_order_.resize(count);
  keys_.resize(count);
  const std::uint32_t last_key = keys_of(codes.data(), selection_.rounded ? 16 : 0, count, keys_.data());
  const auto length = [](std::int64_t number) { return number == 0 ? 0 : 64 - __builtin_clzll(number); };
  const int all_bits = std::max(length(last_key), 1);
  const int passes = (all_bits - 1) / length(std::clamp<std::int64_t>(count, 1 << 5, 1 << 14)) + 1;
  const int bits = (all_bits + passes - 1) / passes;
  const std::uint32_t mask = (1u << bits) - 1, *const keys = keys_.data();
  for (int pass = 0; pass < passes; ++pass) {
    const std::uint32_t *const order = order_.data(), low = std::uint32_t(pass * bits);
    std::uint32_t* const next_order = next_order_.data();
    std::int32_t* const out = ranks.data();
    if (passes == 1)
      sort([=](std::int64_t place) { return keys[place]; },
           [=](std::int64_t place, std::uint32_t next) { out[place] = std::int32_t(next); }, count, bits);
    else if (pass == 0)
      sort([=](std::int64_t place) { return keys[place] & mask; },
           [=](std::int64_t place, std::uint32_t next) { next_order[next] = std::uint32_t(place); }, count, bits);
    else if (pass + 1 < passes)
      sort([=](std::int64_t place) { return keys[order[place]] >> low & mask; },
           [=](std::int64_t place, std::uint32_t next) { next_order[next] = order[place]; }, count, bits);
    else
      sort([=](std::int64_t place) { return keys[order[place]] >> low; },
           [=](std::int64_t place, std::uint32_t next) { out[order[place]] = std::int32_t(next); }, count, bits);
    order_.swap(next_order_);
  }
}

// Calls put(place, next) with the next place of each one in the order of its digit, of `bits` bits. The two halves have
// counters of their own, because an addition in memory waits for the one before it in the same place.
template <class Digit, class Put>
void RowRanks::sort(const Digit& digit, const Put& put, std::int64_t count, int bits) {
  const std::int64_t values = std::int64_t(1) << bits, half = count / 2;
  starts_.assign(2 * values + 16, 0);
  std::uint32_t *const first = starts_.data(), *const second = first + values + 16;
  for (std::int64_t place = 0; place < half; ++place) {
    ++first[digit(place)];
    ++second[digit(half + place)];
  }
  if (count % 2) ++second[digit(count - 1)];
  std::uint32_t total = 0;
  for (std::int64_t value = 0; value < values; ++value) {
    const std::uint32_t in_first = first[value], in_both = in_first + second[value];
    first[value] = total;
    second[value] = total + in_first;
    total += in_both;
  }
  for (std::int64_t place = 0; place < half; ++place) {
    put(place, first[digit(place)]++);
    put(half + place, second[digit(half + place)]++);
  }
  if (count % 2) put(count - 1, second[digit(count - 1)]++);
}

// ---- random numbers

Draws::Draws(const std::vector<Operand>& operands, const Operand& base, const Selection& selection, bool writes_masks)
    : selection_(selection),
      writes_masks_(writes_masks),
      rows_(operands, base, selection),
      row_masks_(operands, base, selection) {
  std::fill(all_.of, all_.of + kTile, kKept);
}

double Draws::probability(std::size_t i) const {
  const auto [first, last] = selection_.probabilities[i];
  return first == last ? first : (first + last) / 2;
}

template <class F>
void Draws::for_ranks(std::size_t i, std::int64_t first, std::int64_t count, const F& f) {
  const std::int64_t columns = selection_.columns;
  const auto [smallest, largest] = selection_.probabilities[i];
  const double step = (largest - smallest) / double(columns - 1);
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t row = (first + done) / columns, column = (first + done) % columns;
    const std::int64_t span = std::min(count - done, columns - column);
    f(done, span, rows_.of(i, row) + column, smallest, step);
    done += span;
  }
}

const std::uint16_t* Draws::draw(std::size_t i, std::int64_t first, std::int64_t count, std::uint16_t* kept) {
  if (!drops(i)) return all_.of;
  std::uint8_t* const mask = selection_.masks.empty() ? nullptr : selection_.masks[i];
  if (mask && !writes_masks_) {
    read_mask(mask, first, count, kept);
    return kept;
  }
  draw_new(i, first, count, kept);
  if (mask) write_mask(kept, first, count, mask);
  return kept;
}

void Draws::draw_new(std::size_t i, std::int64_t first, std::int64_t count, std::uint16_t* kept) {
  const std::int64_t columns = selection_.columns;
  if (by_rank(i) && RowMasks::has(selection_)) {
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t row = (first + done) / columns, column = (first + done) % columns;
      const std::int64_t span = std::min(count - done, columns - column);
      std::copy_n(row_masks_.of(i, row) + column, span, kept + done);
      done += span;
    }
    return;
  }
  const std::uint16_t* const numbers = uniform16(selection_.keys[i], first, count, numbers_);
  if (by_rank(i)) {
    for_ranks(i, first, count,
              [&](std::int64_t done, std::int64_t span, const std::int32_t* ranks, double smallest, double step) {
                keep_by_rank(numbers + done, ranks, smallest, step, span, kept + done);
              });
    return;
  }
  // The number of the numbers u with u + 0.5 < 65536 p.
  const double limit = std::ceil(65536 * probability(i) - 0.5);
  keep_below(numbers, limit > 0 ? std::uint32_t(std::min(limit, 65536.0)) : 0, count, kept);
}

void Draws::inverses(std::size_t i, std::int64_t first, std::int64_t count, float* out) {
  if (!by_rank(i)) {
    std::fill(out, out + count, float(1 / probability(i)));
    return;
  }
  for_ranks(i, first, count,
            [&](std::int64_t done, std::int64_t span, const std::int32_t* ranks, double smallest, double step) {
              inverses_by_rank(ranks, smallest, step, span, out + done);
            });
}

}  // namespace arcmerge
