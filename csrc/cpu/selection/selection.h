// The selection of elements of differences by magnitude and at random, tile by tile (python/arcmerge/ops/selection.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {

template <class T>
struct alignas(64) Tile {
  T of[kTile];
};

// The bit of a kept element, above the 15 bits of the prefix of a code.
constexpr std::uint16_t kKept = 0x8000;

// The codes of magnitudes, the results of operations of either sign.
template <class Isa>
ARCMERGE_INLINE typename Vector<Isa>::U32 code(const typename Vector<Isa>::F32& magnitude) {
  using I32 = typename Vector<Isa>::I32;
  const I32 nan = I32{} + 0x7fc00000;  // the smallest that an operation gives
  const I32 bits = (I32)magnitude & 0x7fffffff;
  return (typename Vector<Isa>::U32)(bits < nan ? bits : nan);
}

// The bits of f32 values rounded to bf16, to nearest even, with anything in their lower halves. Not for a NaN.
template <class U32>
ARCMERGE_INLINE U32 nearest_bf16(const U32& bits) {
  return bits + 0x7fffu + (bits >> 16 & 1u);
}

// The codes of magnitudes that are rounded to bf16, with anything in their lower halves.
template <class Isa>
ARCMERGE_INLINE typename Vector<Isa>::U32 rounded_code(const typename Vector<Isa>::F32& magnitude) {
  return nearest_bf16(code<Isa>(magnitude));
}

// The upper halves of two registers in words, that of `even` in the lower half of a word.
template <class U32>
ARCMERGE_INLINE U32 upper_halves(const U32& even, const U32& odd) {
  return even >> 16 | (odd & 0xffff0000u);
}

// The rounded codes of differences of bf16 values, of which a word has two, the even one in the lower half. That of a
// NaN may be any above that of infinity.
template <class Isa>
ARCMERGE_INLINE typename Vector<Isa>::U32 rounded_codes_of_words(const typename Vector<Isa>::U32& x,
                                                                 const typename Vector<Isa>::U32& base) {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  const U32 even = (U32)((F32)(x << 16) - (F32)(base << 16)) & 0x7fffffffu;
  const U32 odd = (U32)((F32)(x & 0xffff0000u) - (F32)(base & 0xffff0000u)) & 0x7fffffffu;
  return upper_halves(nearest_bf16(even), nearest_bf16(odd));
}

// Differences of tiles of all inputs from the base, and their codes.
class Differences {
 public:
  Differences(const std::vector<Operand>& operands, const Operand& base, const Selection& selection);

  // Reads elements [first, first + count), at most a tile, of all inputs or of the base.
  void read(std::int64_t first, std::int64_t count);
  void read_base(std::int64_t first, std::int64_t count) { widen(base_operand_, first, count, base_.of); }

  std::size_t size() const { return operands_.size(); }
  float* base() { return base_.of; }
  const Tile<float>* tiles() const { return differences_.data(); }
  float* operator[](std::size_t i) { return differences_[i].of; }
  const std::uint32_t* codes(std::size_t i) const { return codes_[selection_.joint ? 0 : i].of; }

 private:
  void encode(const float* magnitudes, std::int64_t first, std::int64_t count, std::uint32_t* codes);

  const std::vector<Operand>& operands_;
  const Operand& base_operand_;
  const Selection& selection_;
  Tile<float> base_, magnitudes_, mean_;
  std::vector<Tile<float>> differences_;
  std::vector<Tile<std::uint32_t>> codes_;
};

// The cuts of an input in a range.
class Cuts {
 public:
  Cuts(const Selection::Cut& cut, const EqualsBefore& before, std::int64_t count);

  // The codes between the cuts, if all elements of a code are on the same side of a cut up to the next call of
  // advance().
  struct Bounds {
    std::int32_t low, high;
  };
  Bounds bounds() const { return between(inside_.code + (inside_.left == 0), above_.code - (above_.left > 0)); }

  // The codes for which this depends on how many elements have them, or -1.
  std::int32_t upper() const { return counted(above_); }
  std::int32_t lower() const { return counted(inside_); }

  // Whether elements of a code are on both sides if so many of the next elements have these codes.
  bool splits(std::int64_t with_upper, std::int64_t with_lower) const {
    return with_upper > above_.left || with_lower > inside_.left;
  }
  // Goes on by `count` elements, where they are not.
  void advance(std::int64_t with_upper, std::int64_t with_lower, std::int64_t count);

  // Goes on by a tile, the elements of which are between the cuts if their codes are in the bounds and `kept` keeps
  // them. It becomes `changed` where elements of a code are on both sides.
  Bounds next(const std::uint32_t* codes, std::int64_t count, const std::uint16_t*& kept, std::uint16_t* changed);

 private:
  // A number of the next elements with one code.
  struct Equals {
    std::int64_t code, left;
  };
  static Bounds between(std::int64_t low, std::int64_t high);
  std::int32_t counted(const Equals& equals) const;

  Equals above_, inside_;  // those above the upper cut, and those not below the lower one
  std::int64_t left_;      // in the range
};

// Throws std::invalid_argument unless there is one entry for each of k inputs.
void require_each(const char* name, std::size_t entries, std::size_t k);
// The same for the arguments of all operations.
void require_selection(const std::vector<Operand>& operands, const Selection& selection, std::int64_t first,
                       std::int64_t count);

}  // namespace arcmerge
