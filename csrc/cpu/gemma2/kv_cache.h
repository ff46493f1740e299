// What attention and rope_cache ask of a cache.
#pragma once

#include <stdexcept>
#include <string>

#include "gemma2.h"

namespace arcmerge {

// Throws std::invalid_argument, with a sentence, unless `heads` of queries share the cache's evenly.
inline void require_cache(const Cache& cache, std::int64_t heads) {
  if (cache.sequences < 0 || cache.heads < 1 || cache.slots < 1 || cache.head_dim < 2 || cache.head_dim % 2)
    throw std::invalid_argument("a cache must have heads, slots and an even number of columns, got " +
                                std::to_string(cache.heads) + ", " + std::to_string(cache.slots) + " and " +
                                std::to_string(cache.head_dim));
  if (heads < 1 || heads % cache.heads)
    throw std::invalid_argument("heads of queries must be a multiple of the " + std::to_string(cache.heads) +
                                " heads of keys, got " + std::to_string(heads));
}

}  // namespace arcmerge
