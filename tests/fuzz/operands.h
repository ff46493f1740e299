// The operands of merge.h: in place, and with the addresses of rows elsewhere.
#pragma once

#include <optional>

#include "native.h"

namespace fuzz {

using arcmerge::Operand;

// The numbers of a matrix, and two operands that hold them.
class Source {
 public:
  Source(Input& in, Count rows, Count columns, bool wild) : rows_(rows), columns_(columns) {
    operand_.dtype = in.dtype();
    operand_.casts = in.byte() % 4 == 0;
    operand_.cast = in.dtype();
    memory_.push_back(tensor(in, rows * columns, operand_.dtype, wild, in.below(8)));
    for (Count i = 0; i < rows * columns; ++i) {
      const float value = value_of(memory_[0].address, operand_.dtype, i);
      values_.push_back(operand_.casts ? rounded(value, operand_.cast) : value);
    }
    const Count bytes = columns * arcmerge::item_size(operand_.dtype);
    for (Count row = 0; row < rows; ++row) {
      memory_.emplace_back(bytes, in.below(4));
      std::memcpy(memory_.back().address, memory_[0].address + row * bytes, bytes);
      addresses_.push_back(reinterpret_cast<std::uint64_t>(memory_.back().address));
    }
  }

  Operand in_place() const {
    Operand operand = operand_;
    operand.address = memory_[0].address;
    return operand;
  }
  Operand by_rows() const {
    Operand operand = operand_;
    operand.rows = addresses_.data();
    operand.columns = columns_;
    return rows_ ? operand : in_place();
  }
  float operator[](Count i) const { return values_[i]; }

 private:
  Count rows_, columns_;
  Operand operand_;
  std::vector<Memory> memory_;
  std::vector<std::uint64_t> addresses_;
  std::vector<float> values_;
};

struct Case {
  Count rows, columns, first, count;
  std::vector<Source> sources;
  std::optional<Source> base;
  std::vector<Operand> whole, parts;  // of the sources

  explicit Case(Input& in, bool with_base = false) {
    const bool wild = in.flag();
    columns = 1 + in.count(4100);
    rows = in.count(std::min<Count>(40, 4500 / columns));
    first = rows * columns ? in.count(rows * columns) : 0;
    count = rows * columns - first;
    if (in.flag()) count = in.count(count);
    const Count k = in.flag() ? 2 : 1 + in.below(12);
    for (Count i = 0; i < k; ++i) sources.emplace_back(in, rows, columns, wild);
    if (in.byte() % 4 == 0 || with_base) base.emplace(in, rows, columns, wild);
    for (const Source& source : sources) {
      whole.push_back(source.in_place());
      parts.push_back(in.flag() ? source.by_rows() : source.in_place());
    }
  }

  Count k() const { return Count(sources.size()); }
  float value(Count j, Count i) const { return base ? sources[j][i] - (*base)[i] : sources[j][i]; }
};

}  // namespace fuzz
