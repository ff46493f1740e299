// Constants that several operations share.
#pragma once

#include <cstdint>

namespace arcmerge {

// Sums run in so many lanes, element i of a range in lane i % kLanes, at every width of the registers. The order of
// additions, and with it the bits of a sum, is therefore the same for all variants.
constexpr std::int64_t kLanes = 16;

constexpr float kLog2E = 1.4426950408889634f;

}  // namespace arcmerge
