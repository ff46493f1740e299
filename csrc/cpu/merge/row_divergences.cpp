// row_divergences: how far the softmax of each row moved from that of the base, which scales a row's magnitudes.
//
// The divergence of two almost equal rows is about half the variance of their difference, 1e-9 and less, which the
// textbook sum of p log(p / q) loses to cancellation. With e = (base - x) - E_p[base - x] it is
// log1p(E_p[expm1(e) - e]), in which all terms are positive.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "cpu/simd/constants.h"
#include "cpu/simd/tile.h"
#include "merge.h"

namespace arcmerge {
namespace {

float divergence(const std::vector<double>& x, const std::vector<double>& base) {
  const std::size_t count = x.size();
  double largest = x[0], total = 0, mean = 0, excess = 0;
  for (const double value : x) largest = std::max(largest, value);
  for (std::size_t c = 0; c < count; ++c) {
    if (!std::isfinite(x[c]) || !std::isfinite(base[c])) return std::numeric_limits<float>::quiet_NaN();
    const double weight = std::exp(x[c] - largest);
    total += weight;
    mean += weight * (base[c] - x[c]);
  }
  mean /= total;
  for (std::size_t c = 0; c < count; ++c) {
    const double e = (base[c] - x[c]) - mean;
    excess += std::exp(x[c] - largest) * (std::expm1(e) - e);
  }
  return float(std::max(0.0, std::log1p(excess / total)));
}

}  // namespace

void row_divergences(float* out, const Operand& x, const Operand& base, std::int64_t columns, std::int64_t first_row,
                     std::int64_t rows) {
  require_matrix(rows, columns);
  require_range(first_row, rows);
  std::vector<double> values(columns), base_values(columns);
  alignas(64) float tile[kTile];
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t done = 0; done < columns; done += kTile) {
      const std::int64_t size = std::min(kTile, columns - done), first = (first_row + row) * columns + done;
      widen(x, first, size, tile);
      std::copy(tile, tile + size, values.begin() + done);
      widen(base, first, size, tile);
      std::copy(tile, tile + size, base_values.begin() + done);
    }
    out[row] = divergence(values, base_values);
  }
}

}  // namespace arcmerge
