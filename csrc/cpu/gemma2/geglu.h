// The activation of the MLP of Gemma-2 on values in f32.
#pragma once

#include <cstdint>

#include "merge.h"

namespace arcmerge {

// gate[i] = gelu(gate[i]) * up[i] for i < count, within a unit in the last place of f32. stepwise: gate, up and the
// gelu are rounded to dtype. The caller rounds the product.
void activate(float* gate, const float* up, std::int64_t count, DType dtype, bool stepwise);

}  // namespace arcmerge
