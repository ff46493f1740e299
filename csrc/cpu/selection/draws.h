// The random numbers that keep elements, and the ranks of elements in their rows, on which probabilities depend.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/selection/row_masks.h"
#include "cpu/selection/selection.h"
#include "merge.h"

namespace arcmerge {

// The ranks of the elements of a row by their codes, equal ones by index.
class RowRanks {
 public:
  RowRanks(const std::vector<Operand>& operands, const Operand& base, const Selection& selection)
      : selection_(selection),
        differences_(operands, base, selection),
        codes_(operands.size()),
        ranks_(operands.size()) {}

  // For input i and the elements of a row, which is read if it is not the one of the last call.
  const std::int32_t* of(std::size_t i, std::int64_t row);

 private:
  void read(std::int64_t row);
  void rank(const std::vector<std::uint32_t>& codes, std::vector<std::int32_t>& ranks);
  template <class Digit, class Put>
  void sort(const Digit& digit, const Put& put, std::int64_t count, int bits);

  const Selection& selection_;
  Differences differences_;
  std::int64_t row_ = -1;
  std::vector<std::vector<std::uint32_t>> codes_;
  std::vector<std::vector<std::int32_t>> ranks_;
  std::vector<std::uint32_t> keys_, starts_, order_, next_order_;
};

// The random numbers that keep elements, or the masks of an earlier operation that drew them.
class Draws {
 public:
  Draws(const std::vector<Operand>& operands, const Operand& base, const Selection& selection, bool writes_masks);

  // Whether any element may be dropped.
  bool drops(std::size_t i) const { return by_rank(i) || probability(i) < 1; }

  // kept[e] = kKept if element first + e is kept, else 0. Returns `kept`, or a constant tile if all are kept. With
  // writes_masks `first` is a multiple of 256.
  const std::uint16_t* draw(std::size_t i, std::int64_t first, std::int64_t count, std::uint16_t* kept);

  // out[e] = 1 / the probability of element first + e.
  void inverses(std::size_t i, std::int64_t first, std::int64_t count, float* out);

 private:
  bool by_rank(std::size_t i) const {
    return selection_.columns != 1 && selection_.probabilities[i].first != selection_.probabilities[i].second;
  }
  double probability(std::size_t i) const;
  // Calls f(done, span, ranks, smallest, step) for each row of a tile: the probability of an element of `span` ones
  // from `done` on is smallest + step * rank.
  template <class F>
  void for_ranks(std::size_t i, std::int64_t first, std::int64_t count, const F& f);

  void draw_new(std::size_t i, std::int64_t first, std::int64_t count, std::uint16_t* kept);

  const Selection& selection_;
  bool writes_masks_;
  RowRanks rows_;
  RowMasks row_masks_;
  std::vector<std::uint16_t> numbers_;
  Tile<std::uint16_t> all_;
};

}  // namespace arcmerge
