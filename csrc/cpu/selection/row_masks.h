// Random masks of rows whose elements are kept with probabilities by rank, without the ranks of most elements.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/selection/selection.h"
#include "merge.h"

namespace arcmerge {

// A random number decides an element unless its code has ranks on both sides of the number's own rank, from which on
// elements are kept. Such elements, about one in a row, take their rank from the equal ones before them.
class RowMasks {
 public:
  RowMasks(const std::vector<Operand>& operands, const Operand& base, const Selection& selection);

  // Whether codes have few enough bits, and rows few enough elements.
  static bool has(const Selection& selection);

  // For input i, kKept for each element of a row that is kept, else 0. The row is read if it is not the one of the last
  // call.
  const std::uint16_t* of(std::size_t i, std::int64_t row);

 private:
  struct Row {
    std::vector<std::uint16_t> codes, kept;
    bool masked = false;
  };

  void read(std::int64_t row);
  void count(const std::vector<std::uint16_t>& codes);
  void mask(std::size_t i, std::int64_t row);

  const Selection& selection_;
  Differences differences_;
  std::int64_t row_ = -1;
  std::vector<Row> rows_;
  std::vector<std::uint16_t> numbers_;
  // firsts_[c]: the rank of the first element of code c, as the one of the next code if there is none.
  std::vector<std::int32_t> counts_, firsts_, thresholds_, undecided_;
};

}  // namespace arcmerge
