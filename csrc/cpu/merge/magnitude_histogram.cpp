// magnitude_histogram: the counts of elements by the codes of their magnitudes, from which methods take their cuts.
#include <algorithm>
#include <stdexcept>

#include "cpu/merge/selection.h"
#include "merge.h"

namespace arcmerge {

constexpr std::int64_t kPrefixes = 1 << 15, kSuffixes = 1 << 16;

void magnitude_histogram(std::int64_t* out, const std::vector<Operand>& operands, const Operand& base,
                         const Selection& selection, std::int64_t first, std::int64_t count) {
  require_selection(operands, selection, first, count);
  const std::int64_t planes = selection.rounded ? 2 : 4;
  Differences differences(operands, base, selection);
  Draws draws(operands, base, selection);
  Tile<std::uint16_t> kept;
  for (std::int64_t done = 0; done < count; done += kTile) {
    const std::int64_t size = std::min(kTile, count - done);
    differences.read(first + done, size);
    for (std::size_t i = 0; i < operands.size(); ++i) {
      draws.draw(i, first + done, size, kept.of);
      const std::uint32_t* codes = differences.codes(i);
      std::int64_t* counts = out + std::int64_t(i) * planes * kPrefixes;
      for (std::int64_t e = 0; e < size; ++e) {
        const std::uint32_t bin = codes[e] >> 16 | kept.of[e];
        ++counts[bin];
        if (!selection.rounded) counts[2 * kPrefixes + bin] += codes[e] & 0xffff;
      }
    }
  }
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
