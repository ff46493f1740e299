// magnitude_histogram: the counts of elements by the codes of their magnitudes, from which methods take their cuts.
//
// A count takes an addition in memory, which waits for the one before it in the same place. Elements are therefore
// counted in turns in kCopies copies of the counters.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/selection/draws.h"
#include "cpu/selection/selection.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {
namespace {

constexpr std::int64_t kBins = 1 << 16, kSuffixes = 1 << 16;

// A bin is the upper half of a code with the bit kKept, which makes it a place in the planes of dropped and kept ones.
constexpr std::int64_t kCopies = 4;
// Copies are not a multiple of 4096 bytes apart, because a load waits for a store to an address with equal last bits.
constexpr std::int64_t kCopy = kBins + 80;
// Ranges up to this size are counted in place, because it takes longer to add up the copies.
constexpr std::int64_t kFew = 1 << 16;

// counters: [kCopies][kCopy]
template <class>
ARCMERGE_INLINE void count_body(const std::uint32_t* codes, const std::uint16_t* kept, std::int64_t count,
                                std::uint32_t* counters) {
  for (std::int64_t e = 0; e < count; ++e) ++counters[e % kCopies * kCopy + (codes[e] >> 16 | kept[e])];
}

// Counts bins, whose number is a multiple of kCopies.
ARCMERGE_INLINE void count_bins(const std::uint16_t* bins, std::int64_t count, std::uint32_t* counters) {
  for (std::int64_t e = 0; e < count; e += kCopies) {
    // One load of four bins, which the compiler must not take apart, is faster than four of one.
    std::uint64_t four;
    std::memcpy(&four, bins + e, sizeof four);
    asm("" : "+r"(four));
    ++counters[four & 0xffff];
    ++counters[kCopy + (four >> 16 & 0xffff)];
    ++counters[2 * kCopy + (four >> 32 & 0xffff)];
    ++counters[3 * kCopy + (four >> 48)];
  }
}

// The bins of bf16 operands in place; the code of a NaN may be any above that of infinity. Most fine-tunes leave many
// elements as they are. If no element is dropped (kept: null), zeros are therefore counted in kApart bins of the plane
// of dropped ones, by their places in a register.
constexpr std::int64_t kApart = 32;

template <class Isa, bool drops>
struct Bins {
  using U32 = typename Vector<Isa>::U32;
  using U16 = typename Vector<Isa>::U16;
  static constexpr std::int64_t kStep = Isa::kBytes / 2;

  static ARCMERGE_INLINE void read(const char* x, const char* base, const std::uint16_t* kept, std::uint16_t* bins) {
    U32 x_words, base_words;
    std::memcpy(&x_words, x, sizeof x_words);
    std::memcpy(&base_words, base, sizeof base_words);
    U16 codes = (U16)rounded_codes_of_words<Isa>(x_words, base_words);
    if constexpr (drops) {
      U16 planes;
      std::memcpy(&planes, kept, sizeof planes);
      codes |= planes;
    } else {
      static constexpr std::uint16_t kPlaces[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                  16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
      static_assert(kStep <= kApart, "each place in a register has a bin");
      U16 places;
      std::memcpy(&places, kPlaces, sizeof places);
      codes = codes == 0 ? places : codes | kKept;
    }
    std::memcpy(bins, &codes, sizeof codes);
  }
};

// Reads the bins of a block while it counts those of the one before.
template <class Isa, bool drops>
ARCMERGE_INLINE void count_in_place(const char* x, const char* base, const std::uint16_t* kept, std::int64_t count,
                                    std::uint32_t* counters) {
  constexpr std::int64_t kBlock = 256, kAhead = 512, kStep = Bins<Isa, drops>::kStep;
  std::uint16_t bins[2][kBlock];
  const auto read = [&](std::int64_t e, std::uint16_t* to) ARCMERGE_LAMBDA {
    __builtin_prefetch(x + 2 * e + kAhead);
    __builtin_prefetch(base + 2 * e + kAhead);
    Bins<Isa, drops>::read(x + 2 * e, base + 2 * e, drops ? kept + e : nullptr, to);
  };
  const std::int64_t blocks = count / kBlock;
  for (std::int64_t block = 0; block <= blocks; ++block)
    for (std::int64_t s = 0; s < kBlock; s += kStep) {
      if (block < blocks) read(block * kBlock + s, bins[block % 2] + s);
      if (block > 0) count_bins(bins[(block + 1) % 2] + s, kStep, counters);
    }
  for (std::int64_t e = blocks * kBlock; e < count; e += kStep) {
    const std::int64_t size = std::min(kStep, count - e);
    char last_x[2 * kStep] = {}, last_base[2 * kStep] = {};
    std::uint16_t last_kept[kStep] = {};
    std::memcpy(last_x, x + 2 * e, 2 * size);
    std::memcpy(last_base, base + 2 * e, 2 * size);
    if (drops) std::memcpy(last_kept, kept + e, 2 * size);
    Bins<Isa, drops>::read(last_x, last_base, last_kept, bins[0]);
    for (std::int64_t i = 0; i < size; ++i) ++counters[bins[0][i]];
  }
}

template <class Isa>
ARCMERGE_INLINE void count_bf16_body(const char* x, const char* base, const std::uint16_t* kept, std::int64_t count,
                                     std::uint32_t* counters) {
  if (kept)
    count_in_place<Isa, true>(x, base, kept, count, counters);
  else
    count_in_place<Isa, false>(x, base, kept, count, counters);
}

ARCMERGE_VARIANTS(void, count,
                  (const std::uint32_t* codes, const std::uint16_t* kept, std::int64_t count, std::uint32_t* counters),
                  (codes, kept, count, counters))
ARCMERGE_VARIANTS(void, count_bf16,
                  (const char* x, const char* base, const std::uint16_t* kept, std::int64_t count,
                   std::uint32_t* counters),
                  (x, base, kept, count, counters))

// Memory of zeros for the counters of an input, which goes from one call of a thread to the next: fresh memory would be
// cleared by the system, page by page, at every call.
class Zeros {
 public:
  Zeros() {
    if (!pool().empty()) {
      memory_ = std::move(pool().back());
      pool().pop_back();
    } else if (memory_.reset(static_cast<char*>(std::calloc(kCopies * kCopy, 8))); !memory_) {
      throw std::bad_alloc();
    }
  }

  char* get() const { return memory_.get(); }
  // The memory must be zeros again.
  void give_back() { pool().push_back(std::move(memory_)); }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<char, Free>;

  static std::vector<Memory>& pool() {
    static thread_local std::vector<Memory> memory;
    return memory;
  }

  Memory memory_;
};

// The counters of an input. Of codes that are not rounded, a counter holds a number of elements in units of kOne, and
// the sum of their lower halves.
class Counts {
 public:
  Counts(std::int64_t* out, bool rounded, std::int64_t count) : out_(out), rounded_(rounded), few_(count <= kFew) {
    if (!few_) memory_.emplace();
  }

  void add(const std::uint32_t* codes, const std::uint16_t* kept, std::int64_t size) {
    if (few_)
      for (std::int64_t e = 0; e < size; ++e) {
        const std::uint32_t bin = codes[e] >> 16 | kept[e];
        ++out_[bin];
        if (!rounded_) out_[kBins + bin] += codes[e] & 0xffff;
      }
    else if (rounded_)
      count(codes, kept, size, counters<std::uint32_t>());
    else
      for (std::int64_t e = 0; e < size; ++e)
        counters<std::uint64_t>()[e % kCopies * kCopy + (codes[e] >> 16 | kept[e])] += kOne + (codes[e] & 0xffff);
    if ((added_ += size) > kMost) flush();
  }

  // kept: null if no element of the range is dropped.
  void add_bf16(const char* x, const char* base, const std::uint16_t* kept, std::int64_t size) {
    apart_ = !kept;
    while (size > 0) {
      const std::int64_t now = std::min(size, kMost - added_);
      count_bf16(x, base, kept, now, counters<std::uint32_t>());
      x += 2 * now;
      base += 2 * now;
      if (kept) kept += now;
      size -= now;
      if ((added_ += now) == kMost) flush();
    }
  }

  void flush() {
    if (few_ || added_ == 0) return;
    if (rounded_)
      flush_each<std::uint32_t>([this](std::int64_t bin, std::uint32_t number) { out_[place(bin)] += number; });
    else
      flush_each<std::uint64_t>([this](std::int64_t bin, std::uint64_t both) {
        out_[bin] += std::int64_t(both / kOne);
        out_[kBins + bin] += std::int64_t(both % kOne);
      });
    added_ = 0;
  }

  // Adds what is not added yet, and ends the use of this object.
  void finish() {
    flush();
    if (memory_) memory_->give_back();
  }

 private:
  static constexpr std::uint64_t kOne = std::uint64_t(1) << 40;
  static constexpr std::int64_t kMost = 1 << 23;

  template <class T>
  T* counters() {
    return reinterpret_cast<T*>(memory_->get());
  }

  // Where the result has a bin of rounded codes.
  std::int64_t place(std::int64_t bin) const {
    constexpr std::int64_t kInfinite = 0x7f80, kNan = 0x7fc0;
    if (apart_ && bin < kApart) return kKept;
    return (bin & ~kKept) > kInfinite ? (bin & kKept) | kNan : bin;
  }

  // Calls add(bin, number) for the counters that are not zero, and sets them to zero. Most are zero.
  template <class T, class Add>
  void flush_each(const Add& add) {
    constexpr std::int64_t kBlock = 64;
    for (std::int64_t copy = 0; copy < kCopies; ++copy) {
      T* const counter = counters<T>() + copy * kCopy;
      for (std::int64_t bin = 0; bin < kBins; bin += kBlock) {
        T any = 0;
        for (std::int64_t i = 0; i < kBlock; ++i) any |= counter[bin + i];
        if (any == 0) continue;
        for (std::int64_t i = 0; i < kBlock; ++i) add(bin + i, std::exchange(counter[bin + i], 0));
      }
    }
  }

  std::int64_t* out_;
  bool rounded_, few_, apart_ = false;
  std::int64_t added_ = 0;
  std::optional<Zeros> memory_;
};

}  // namespace

void magnitude_histogram(std::int64_t* out, const std::vector<Operand>& operands, const Operand& base,
                         const Selection& selection, std::int64_t first, std::int64_t count) {
  require_selection(operands, selection, first, count);
  const std::size_t k = operands.size();
  const bool is_fast = count > kFew && selection.rounded && !selection.joint && !selection.row_scales &&
                       is_plain_bf16(base) && std::all_of(operands.begin(), operands.end(), is_plain_bf16);
  Differences differences(operands, base, selection);
  Draws draws(operands, base, selection, false);
  std::vector<Counts> counts;
  for (std::size_t i = 0; i < k; ++i)
    counts.emplace_back(out + std::int64_t(i) * (selection.rounded ? kBins : 2 * kBins), selection.rounded, count);
  Tile<std::uint16_t> drawn;
  for (std::int64_t done = 0; done < count; done += kTile) {
    const std::int64_t size = std::min(kTile, count - done), start = first + done;
    if (!is_fast) differences.read(start, size);
    for (std::size_t i = 0; i < k; ++i) {
      const std::uint16_t* kept = draws.draw(i, start, size, drawn.of);
      if (is_fast)
        counts[i].add_bf16(operands[i].address + 2 * start, base.address + 2 * start, draws.drops(i) ? kept : nullptr,
                           size);
      else
        counts[i].add(differences.codes(i), kept, size);
    }
  }
  for (Counts& each : counts) each.finish();
}

void magnitude_histogram_within(std::int64_t* out, const std::vector<Operand>& operands, const Operand& base,
                                const Selection& selection, const std::vector<std::vector<std::int64_t>>& prefixes,
                                std::int64_t first, std::int64_t count) {
  require_selection(operands, selection, first, count);
  require_each("prefixes", prefixes.size(), operands.size());
  for (const auto& row : prefixes)
    if (row.size() != prefixes[0].size())
      throw std::invalid_argument("'prefixes' must be as many for every operand (" +
                                  std::to_string(prefixes[0].size()) + "), got " + std::to_string(row.size()));
  Differences differences(operands, base, selection);
  for (std::int64_t done = 0; done < count; done += kTile) {
    const std::int64_t size = std::min(kTile, count - done);
    differences.read(first + done, size);
    std::int64_t* counts = out;
    for (std::size_t i = 0; i < operands.size(); ++i)
      for (const std::int64_t prefix : prefixes[i]) {
        for (std::int64_t e = 0; e < size; ++e) {
          const std::uint32_t code = differences.codes(i)[e];
          if (std::int64_t(code >> 16) == prefix) ++counts[code & 0xffff];
        }
        counts += kSuffixes;
      }
  }
}

}  // namespace arcmerge
