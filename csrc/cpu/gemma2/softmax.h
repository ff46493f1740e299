// The softmax of attention, by blocks of keys (Milakov and Gimelshein 2018) and in powers of two, and that of logits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "merge.h"

namespace arcmerge {

// The scores of a call: scale * query . key, capped by softcap. A query sees the last `window` positions up to its own.
struct ScoreParameters {
  float scale, softcap;  // softcap 0: no cap
  std::uint32_t window;
};

inline ScoreParameters score_parameters(double scale, double softcap, std::int64_t window) {
  constexpr std::int64_t kAll = std::int64_t(1) << 31;
  return {float(scale), float(softcap), std::uint32_t(window ? std::min(window, kAll) : kAll)};
}

// The state of a softmax over blocks of keys, for each column: the largest score so far, times log2(e); the sum of
// 2^(score - max); and the factor for older sums, as max has risen.
struct RunningSoftmax {
  float *max, *sum, *factor;
};
// The initial max, below all scores.
constexpr float kLowest = -1e30f;

// Adds a block of keys to `running`.
//
// products: [keys][columns], of each query with the keys at positions [first, first + keys); they are overwritten.
// positions: [columns], of each query. weights: 2^(score - max) rounded to dtype, 0 for keys that a query does not see;
// [keys][columns] words for f32, and [(keys + 1) / 2][columns] words of two keys each for bf16.
void softmax_block(std::uint32_t* weights, float* products, std::int64_t keys, std::int64_t columns, std::int64_t first,
                   const std::int32_t* positions, const ScoreParameters& scoring, const RunningSoftmax& running,
                   DType dtype);

struct SoftmaxStatistics {
  float max, sum;
};

// The largest logit and the sum of exp(logit - max). max is -inf if all logits are -inf or NaN. count: a multiple of
// kLanes.
SoftmaxStatistics logit_statistics(const float* logits, std::int64_t count);

// logit = softcap * tanh(logit / softcap). count: a multiple of kLanes.
void cap_logits(float* logits, std::int64_t count, float softcap);

// The softmax of a single query that sees all keys, with sum = the sum of 2^(score - max). products: [keys],
// overwritten by the weights, rounded to dtype; its memory must hold a multiple of kLanes elements.
SoftmaxStatistics softmax_row(float* products, std::int64_t keys, const ScoreParameters& scoring, DType dtype);

}  // namespace arcmerge
