// The random numbers of elements, from 0 to 65535: uniform16 of python/arcmerge/ops/philox.py.
#pragma once

#include <cstdint>
#include <vector>

namespace arcmerge {

// The numbers of elements [first, first + count). They lie in `memory`, which grows as needed.
const std::uint16_t* uniform16(std::uint64_t key, std::int64_t first, std::int64_t count,
                               std::vector<std::uint16_t>& memory);

}  // namespace arcmerge
