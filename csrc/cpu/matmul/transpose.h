// The transpose of a matrix of 4-byte words.
#pragma once

#include <cstdint>

namespace arcmerge {

// out[word * columns + i] = word `word` of row i, where a row has `words` words and starts `stride` bytes after the one
// before it.
void transpose(std::uint32_t* out, std::int64_t columns, const void* source, std::int64_t stride, std::int64_t rows,
               std::int64_t words);

}  // namespace arcmerge
