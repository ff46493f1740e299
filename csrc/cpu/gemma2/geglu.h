// The activation of Gemma-2's MLP on values in f32, for the operations that end in it.
#pragma once

#include <cstdint>

#include "merge.h"

namespace arcmerge {

// gate[i] = gelu(gate[i]) * up[i] for i < count, within a unit of the last place of f32 before any rounding to dtype.
// stepwise: gate and up are rounded to dtype first, then gelu; the product is left to the caller in any case.
void activate(float* gate, const float* up, std::int64_t count, DType dtype, bool stepwise);

}  // namespace arcmerge
