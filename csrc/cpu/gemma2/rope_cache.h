// The parts of rope_cache that attention uses.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "gemma2.h"

namespace arcmerge {

// Throws std::invalid_argument unless the cache is valid and `heads` query heads share its heads evenly.
inline void require_cache(const KvCache& cache, std::int64_t heads) {
  if (cache.sequences < 0 || cache.heads < 1 || cache.slots < 1 || cache.head_dim < 2 || cache.head_dim % 2)
    throw std::invalid_argument("'cache' must have heads, slots and an even head_dim, got " +
                                std::to_string(cache.heads) + ", " + std::to_string(cache.slots) + " and " +
                                std::to_string(cache.head_dim));
  if (heads < 1 || heads % cache.heads)
    throw std::invalid_argument("'heads' must be a multiple of the cache's " + std::to_string(cache.heads) + ", got " +
                                std::to_string(heads));
}

// The rotary embedding of one head of `dim` elements: with half = dim / 2 and i < half,
//
//     out[i]        = x[i] * cos[i] - x[half + i] * sin[i]
//     out[half + i] = x[half + i] * cos[i] + x[i] * sin[i]
//
// table: cos, then sin. With a table in bf16, which needs x in bf16, every product and sum is rounded; with a table in
// f32 only the result is.
void rotate(void* out, const void* x, DType dtype, const void* table, DType table_dtype, std::int64_t dim);

}  // namespace arcmerge
