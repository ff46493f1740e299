// What is done to the logits of one token and a block of ids.
#pragma once

#include <cstdint>

namespace arcmerge {

// softcap * tanh(logit / softcap); count: a multiple of 16.
void cap_logits(float* logits, std::int64_t count, float softcap);

struct Extremes {
  float greatest, sum;  // sum of exp(logit - greatest)
};

// count: a multiple of 16. -inf for `greatest` if all are that, or not numbers.
Extremes extremes(const float* logits, std::int64_t count);

}  // namespace arcmerge
