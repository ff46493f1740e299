// The softmax of attention, a block of keys at a time (Milakov and Gimelshein 2018), in powers of two.
#pragma once

#include <algorithm>
#include <cstdint>

#include "merge.h"

namespace arcmerge {

// Of whoever asks, what they see: keys at most `reach` - 1 positions back.
struct Sight {
  float scale, softcap;  // softcap 0: none
  std::uint32_t reach;
};

inline Sight sight(double scale, double softcap, std::int64_t window) {
  constexpr std::int64_t kAll = std::int64_t(1) << 31;
  return {float(scale), float(softcap), std::uint32_t(window ? std::min(window, kAll) : kAll)};
}

// Of each column: the greatest score so far, times log2(e); the sum of 2^(score - greatest); what to multiply older
// sums by now that `greatest` has risen. kNone is below all scores.
struct Columns {
  float *greatest, *sums, *factors;
};
constexpr float kNone = -1e30f;

// products[key * columns + j] of queries j with the `keys` keys from position `first` on, overwritten; positions[j]:
// of query j. weights: 2^(score - greatest) rounded to dtype, those of two keys of bf16 in a word, as
// [(keys + 1) / 2][columns] or [keys][columns] words, 0 for keys that are not seen.
void softmax_block(std::uint32_t* weights, float* products, std::int64_t keys, std::int64_t columns, std::int64_t first,
                   const std::int32_t* positions, const Sight& sight, const Columns& so_far, DType dtype);

struct Statistics {
  float greatest, sum;
};

// A single query, which sees all the keys: products[key], overwritten by weights rounded to dtype. There must be room
// for a multiple of 16.
Statistics softmax_row(float* products, std::int64_t keys, const Sight& sight, DType dtype);

}  // namespace arcmerge
