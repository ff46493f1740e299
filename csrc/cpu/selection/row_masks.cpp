#include "cpu/selection/row_masks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "cpu/selection/uniform16.h"
#include "cpu/simd/shuffle.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

// Places in the order of codes, of which few are counted: 0 for the code 0, 1 for all codes up to `origin`, and one for
// each code from there on. Nearly all weights lie within eight powers of two of the largest of a row.
constexpr std::int64_t kFewPlaces = 1 << 10, kAllPlaces = 1 << 15;
// Not a multiple of 4096 bytes, because a load waits for a store to an address with equal last bits.
constexpr std::int64_t kPad = 96;
// Segments of a row have counters of their own, because an addition in memory waits for the one before it in the same
// place, and because equal elements before an element are counted from its segment on.
constexpr std::int64_t kSegments = 4;
// The numbers of open elements are divided into up to so many intervals.
constexpr int kIntervals = 32;
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

template <class>
ARCMERGE_INLINE std::uint16_t largest_of_body(const std::uint16_t* codes, std::int64_t count) {
  std::uint16_t largest = 0;
  for (std::int64_t e = 0; e < count; ++e) largest = std::max(largest, codes[e]);
  return largest;
}

template <class>
ARCMERGE_INLINE void places_of_body(const std::uint16_t* codes, std::uint16_t origin, std::int64_t count,
                                    std::uint16_t* places) {
  for (std::int64_t e = 0; e < count; ++e) {
    const std::uint16_t above = codes[e] > origin ? std::uint16_t(codes[e] - origin) : 0;
    places[e] = std::uint16_t(above + (codes[e] != 0));
  }
}

// kept: kKept for numbers below `first`; open: 0x80 for those from it on to `last`. A range of zero elements has
// first > last.
template <class>
ARCMERGE_INLINE void divide_body(const std::uint16_t* numbers, std::int32_t first, std::int32_t last,
                                 std::int64_t count, std::uint16_t* kept, std::uint8_t* open) {
  const auto width = std::uint16_t(last - first);
  const auto low = std::uint16_t(first);
  const std::uint16_t all = first > 0xffff ? kKept : 0;
  const std::uint8_t some = first > last ? 0 : 0x80;
  for (std::int64_t e = 0; e < count; ++e) kept[e] = numbers[e] < low ? kKept : all;
  for (std::int64_t e = 0; e < count; ++e) open[e] = std::uint16_t(numbers[e] - low) <= width ? some : 0;
}

// Adds up the counts of segments, and sets firsts[place] to the number of elements before a place.
template <class Isa>
ARCMERGE_INLINE void accumulate_body(std::uint16_t* counts, std::int64_t stride, std::int64_t places,
                                     std::int32_t* firsts) {
  using U16 = typename Vector<Isa>::U16;
  constexpr int kLanes = Isa::kBytes / 2;
  U16 sources[5], last;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int step = 0; 1 << step < kLanes; ++step)
      sources[step][lane] = std::uint16_t(lane < 1 << step ? kLanes : lane - (1 << step));
    last[lane] = kLanes - 1;
  }
  U16 before = {};
  for (std::int64_t place = 0; place < places; place += kLanes) {
    U16 sum = {};
    for (std::int64_t segment = 0; segment < kSegments; ++segment) {
      U16 some;
      std::memcpy(&some, counts + segment * stride + place, sizeof some);
      sum += some;
      std::memcpy(counts + segment * stride + place, &sum, sizeof sum);
    }
    U16 up_to = sum;
    for (int step = 0; 1 << step < kLanes; ++step) up_to += shuffle(up_to, U16{}, sources[step]);
    const U16 found = up_to - sum + before;
    for (int lane = 0; lane < kLanes; ++lane) firsts[place + lane] = found[lane];
    before += shuffle(up_to, U16{}, last);
  }
  firsts[places] = before[0];
}

// For each limit, the number of places whose first rank is not above it.
template <class>
ARCMERGE_INLINE void count_up_to_body(const std::int32_t* firsts, std::int64_t places, const std::int32_t* limits,
                                      int count, std::uint16_t* found) {
  std::int32_t below[2 * kIntervals] = {};
  for (std::int64_t step = places / 2; step > 0; step /= 2)
    for (int i = 0; i < count; ++i) below[i] += firsts[below[i] + step - 1] <= limits[i] ? std::int32_t(step) : 0;
  for (int i = 0; i < count; ++i) found[i] = std::uint16_t(below[i] + (firsts[below[i]] <= limits[i]));
}

// Decides the open elements whose interval of numbers and place are enough: those from keeps[interval] on are kept,
// those below drops[interval] are not.
template <class Isa>
ARCMERGE_INLINE void narrow_body(const std::uint16_t* numbers, const std::uint16_t* places, std::uint16_t low,
                                 int shift, const std::uint16_t* keeps, const std::uint16_t* drops, std::int64_t count,
                                 std::uint16_t* kept, std::uint8_t* open) {
  // Only AVX-512 has an instruction that looks up 32 words.
  if constexpr (Isa::kBytes == 64) {
    using U16 = typename Vector<Isa>::U16;
    typedef std::uint8_t U8 __attribute__((vector_size(32)));
    U16 keep_from, drop_below;
    std::memcpy(&keep_from, keeps, sizeof keep_from);
    std::memcpy(&drop_below, drops, sizeof drop_below);
    for (std::int64_t e = 0; e + 32 <= count; e += 32) {
      U16 number, place, keep;
      U8 is_open;
      std::memcpy(&number, numbers + e, sizeof number);
      std::memcpy(&place, places + e, sizeof place);
      std::memcpy(&keep, kept + e, sizeof keep);
      std::memcpy(&is_open, open + e, sizeof is_open);
      const U16 interval = (number - low) >> shift;
      const U16 is_kept = (U16)(place >= shuffle(keep_from, U16{}, interval));
      const U16 is_dropped = (U16)(place < shuffle(drop_below, U16{}, interval));
      const U16 wide = __builtin_convertvector(is_open, U16) << 8;
      keep |= wide & is_kept;
      const U8 left = __builtin_convertvector((wide & ~(is_kept | is_dropped)) >> 8, U8);
      std::memcpy(kept + e, &keep, sizeof keep);
      std::memcpy(open + e, &left, sizeof left);
    }
  }
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
template <class>
ARCMERGE_INLINE std::int32_t count_less16_body(const std::uint16_t* codes, std::uint16_t code, std::int64_t count) {
  std::int32_t less = 0;
  for (std::int64_t done = 0; done < count; done += 0x8000) {
    std::uint16_t some = 0;
    for (std::int64_t e = done; e < std::min<std::int64_t>(count, done + 0x8000); ++e) some += codes[e] < code;
    less += some;
  }
  return less;
}

ARCMERGE_VARIANTS(void, codes_of_bf16, (const char* x, const char* base, std::int64_t count, std::uint16_t* codes),
                  (x, base, count, codes))
ARCMERGE_VARIANTS(void, halve, (const std::uint32_t* codes, std::int64_t count, std::uint16_t* halves),
                  (codes, count, halves))
ARCMERGE_VARIANTS(std::uint16_t, largest_of, (const std::uint16_t* codes, std::int64_t count), (codes, count))
ARCMERGE_VARIANTS(void, places_of,
                  (const std::uint16_t* codes, std::uint16_t origin, std::int64_t count, std::uint16_t* places),
                  (codes, origin, count, places))
ARCMERGE_VARIANTS(void, divide,
                  (const std::uint16_t* numbers, std::int32_t first, std::int32_t last, std::int64_t count,
                   std::uint16_t* kept, std::uint8_t* open),
                  (numbers, first, last, count, kept, open))
ARCMERGE_VARIANTS(void, accumulate,
                  (std::uint16_t* counts, std::int64_t stride, std::int64_t places, std::int32_t* firsts),
                  (counts, stride, places, firsts))
ARCMERGE_VARIANTS(void, count_up_to,
                  (const std::int32_t* firsts, std::int64_t places, const std::int32_t* limits, int count,
                   std::uint16_t* found),
                  (firsts, places, limits, count, found))
ARCMERGE_VARIANTS(void, narrow,
                  (const std::uint16_t* numbers, const std::uint16_t* places, std::uint16_t low, int shift,
                   const std::uint16_t* keeps, const std::uint16_t* drops, std::int64_t count, std::uint16_t* kept,
                   std::uint8_t* open),
                  (numbers, places, low, shift, keeps, drops, count, kept, open))
ARCMERGE_VARIANTS(std::int32_t, count_equal16, (const std::uint16_t* codes, std::uint16_t code, std::int64_t count),
                  (codes, code, count))
ARCMERGE_VARIANTS(std::int32_t, count_less16, (const std::uint16_t* codes, std::uint16_t code, std::int64_t count),
                  (codes, code, count))

}  // namespace

bool RowMasks::has(const Selection& selection) {
  // Thresholds of f32 are off by less than 1 up to this one.
  constexpr double kMost = 1 << 20;
  return selection.rounded && selection.columns <= 0xffff &&
         std::all_of(selection.probabilities.begin(), selection.probabilities.end(),
                     [&](const std::pair<double, double>& each) {
                       const auto [smallest, largest] = each;
                       return smallest == largest || double(selection.columns) <= kMost * (largest - smallest);
                     });
}

RowMasks::RowMasks(const std::vector<Operand>& operands, const Operand& base, const Selection& selection)
    : operands_(operands),
      base_(base),
      selection_(selection),
      in_place_(!selection.joint && !selection.row_scales && is_plain_bf16(base) &&
                std::all_of(operands.begin(), operands.end(), is_plain_bf16)),
      differences_(operands, base, selection),
      rows_(operands.size()),
      used_(kFewPlaces) {}

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

// Counts all places. There are more of them if too many elements share place 1.
void RowMasks::count(const std::vector<std::uint16_t>& codes) {
  const std::int64_t size = std::int64_t(codes.size()), length = size / kSegments;
  const std::int64_t largest = largest_of(codes.data(), size);
  places_.resize(size);
  for (;; used_ = kAllPlaces) {
    const auto origin = std::uint16_t(std::max<std::int64_t>(largest + 2 - used_, 1));
    const std::int64_t stride = used_ + kPad;
    counts_.assign(kSegments * stride, 0);
    firsts_.resize(used_ + 1);
    places_of(codes.data(), origin, size, places_.data());
    const std::uint16_t* const places = places_.data();
    std::uint16_t* const counts = counts_.data();
    for (std::int64_t e = 0; e < length; ++e)
      for (std::int64_t segment = 0; segment < kSegments; ++segment)
        ++counts[segment * stride + places[segment * length + e]];
    for (std::int64_t e = kSegments * length; e < size; ++e) ++counts[(kSegments - 1) * stride + places[e]];
    accumulate(counts, stride, used_, firsts_.data());
    if (used_ == kAllPlaces || origin == 1 || firsts_[2] - firsts_[1] <= size / 32) return;
  }
}

// How many elements before element e of the row that was counted last have its place.
std::int32_t RowMasks::equal_before(std::int64_t e) const {
  const std::int64_t length = std::int64_t(places_.size()) / kSegments;
  const std::int64_t segment = length ? std::min(e / length, kSegments - 1) : kSegments - 1;
  const std::int32_t found = segment ? counts_[(segment - 1) * (used_ + kPad) + places_[e]] : 0;
  return found + count_equal16(places_.data() + segment * length, places_[e], e - segment * length);
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
  const auto limit = [&, smallest = smallest](std::int64_t rank) { return 65536 * (smallest + step * double(rank)); };
  const auto kept_below = [&](std::int64_t rank) { return std::int32_t(std::ceil(limit(rank) - 0.5)); };
  const std::int32_t first = std::max(kept_below(0), 0);
  const std::int32_t last = std::min(kept_below(columns - 1), 0x10000) - 1;
  const std::int64_t padded = (columns + 63) / 64 * 64;
  open_.assign(padded, 0);
  undecided_.resize(columns + 1);
  divide(numbers, first, last, columns, here.kept.data(), open_.data());

  // The rank from which on an element of a number is kept, +-1.
  const float scale = float(1 / (65536 * step)), offset = float((smallest - 0.5 / 65536) / step);
  const auto threshold_of = [=](std::int32_t number) { return std::int32_t(float(number) * scale - offset); };
  if (first <= last) {
    int shift = 0;
    while ((last - first) >> shift >= kIntervals) ++shift;
    std::int32_t limits[2 * kIntervals];
    std::uint16_t bounds[2 * kIntervals];
    for (std::int32_t n = 0; n < kIntervals; ++n) {
      const std::int32_t number = first + (n << shift);
      limits[n] = threshold_of(number + (1 << shift) - 1) + 2;
      limits[kIntervals + n] = threshold_of(number) - 2;
    }
    count_up_to(firsts_.data(), used_, limits, 2 * kIntervals, bounds);
    for (int n = kIntervals; n < 2 * kIntervals; ++n) bounds[n] -= bounds[n] > 0;
    narrow(numbers, places_.data(), std::uint16_t(first), shift, bounds, bounds + kIntervals, columns, here.kept.data(),
           open_.data());
  }

  std::int64_t undecided = 0;
  const auto decide = [&](std::int64_t e, std::int32_t rank) {
    here.kept[e] = double(std::int32_t(numbers[e])) + 0.5 < limit(rank) ? kKept : 0;
  };
  for (std::int64_t done = 0; done < padded; done += 8) {
    std::uint64_t eight;
    std::memcpy(&eight, open_.data() + done, sizeof eight);
    for (; eight != 0; eight &= eight - 1) {
      const std::int64_t e = done + __builtin_ctzll(eight) / 8;
      const std::int32_t threshold = threshold_of(numbers[e]);
      const std::int32_t* const ranks = firsts_.data() + places_[e];
      const bool keeps = ranks[0] > threshold + 2, drops = ranks[1] < threshold - 1;
      here.kept[e] = std::uint16_t(keeps << 15);
      undecided_[undecided] = std::int32_t(e);
      undecided += !keeps & !drops;
    }
  }
  // The rank of an element that shares its place with elements of other codes.
  const auto rank_of_shared = [&](std::int32_t e) {
    return count_less16(codes.data(), codes[e], columns) + count_equal16(codes.data(), codes[e], e);
  };
  if (undecided <= kFew) {
    for (std::int64_t n = 0; n < undecided; ++n) {
      const std::int32_t e = undecided_[n];
      decide(e, places_[e] == 1 ? rank_of_shared(e) : firsts_[places_[e]] + equal_before(e));
    }
  } else {
    for (std::int64_t e = 0, n = 0; n < undecided; ++e) {
      const std::int32_t rank = firsts_[places_[e]]++;
      if (e == undecided_[n]) decide(undecided_[n++], places_[e] == 1 ? rank_of_shared(std::int32_t(e)) : rank);
    }
  }
  here.masked = true;
}

}  // namespace arcmerge
