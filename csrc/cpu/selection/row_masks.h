// Random masks of rows whose elements are kept with probabilities by rank, without the ranks of most elements.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/selection/selection.h"
#include "merge.h"

namespace arcmerge {

// Most random numbers keep an element of any rank, or of none. Others keep it from a rank on, which the number of
// smaller codes decides. Where equal codes have ranks on both sides of that one, equal ones before the element count.
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
  std::int32_t equal_before(std::int64_t e) const;
  void mask(std::size_t i, std::int64_t row);

  const std::vector<Operand>& operands_;
  const Operand& base_;
  const Selection& selection_;
  const bool in_place_;
  Differences differences_;
  std::int64_t row_ = -1;
  std::vector<Row> rows_;
  std::vector<std::uint16_t> numbers_;
  std::vector<std::uint8_t> open_;
  // Of the row that was counted last: the places of its elements; [segments][places], the counts of the first segment,
  // of the first two, and so on; and the rank of the first element of a place, where it has none that of the next one.
  std::vector<std::uint16_t> places_, counts_;
  std::vector<std::int32_t> firsts_, undecided_;
  std::int64_t used_;  // the number of places
};

}  // namespace arcmerge
