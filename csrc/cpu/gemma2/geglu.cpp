// geglu: gelu(gate) * up, with the tanh approximation of gelu.
//
//     gelu(g) = g / 2 * (1 + tanh(z))    with z = sqrt(2 / pi) * (g + 0.044715 g^3)
//             = g / (1 + exp(-2z))       as 1 + tanh(z) = 2 / (1 + exp(-2z))
//
// Nothing cancels in the last form, neither near zero nor where gelu itself is near zero. It is computed in f64,
// because in f32 the rounding of a large t would show in 2^t. It consists of plain products, sums and a quotient, so
// that all variants give the same bits.
#include "cpu/gemma2/geglu.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/simd/convert.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

// 2^t for -1000 <= t <= 1024; 2^1024 is infinite. t = n + f with an integer n, and 2^f = exp(f ln 2) by its Taylor
// series. As |f ln 2| < 0.347, its terms from the eighth power on are below 2^-27.
ARCMERGE_INLINE double exp2_f64(double t) {
  constexpr double kLogOfTwo = 0.6931471805599453;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52; the sum has n in its last bits
  const double shifted = t + kRound;
  const double x = (t - (shifted - kRound)) * kLogOfTwo;
  double series = 1.0 / 5040 * x + 1.0 / 720;
  series = series * x + 1.0 / 120;
  series = series * x + 1.0 / 24;
  series = series * x + 1.0 / 6;
  series = series * x + 0.5;
  series = series * x + 1;
  series = series * x + 1;
  std::uint64_t n, bits;
  std::memcpy(&n, &shifted, sizeof n);
  std::memcpy(&bits, &series, sizeof bits);
  bits += n << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

ARCMERGE_INLINE double gelu(double gate) {
  constexpr double kScale = -2 * 0.7978845608028654 * 1.4426950408889634;  // -2 sqrt(2 / pi) / ln 2
  const double t = kScale * (gate + 0.044715 * gate * gate * gate);
  const double bounded = t < 1024 ? (t > -1000 ? t : -1000) : 1024;
  return gate / (1 + exp2_f64(bounded));
}

template <class>
ARCMERGE_INLINE void activate_body(float* gate, const float* up, std::int64_t count, DType dtype, bool stepwise) {
  if (stepwise && dtype == DType::bf16) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float activated = float(gelu(double(from_bf16(to_bf16(gate[i])))));
      gate[i] = from_bf16(to_bf16(activated)) * from_bf16(to_bf16(up[i]));
    }
  } else {
    for (std::int64_t i = 0; i < count; ++i) gate[i] = float(gelu(double(gate[i]))) * up[i];
  }
}

}  // namespace

ARCMERGE_VARIANTS(void, activate, (float* gate, const float* up, std::int64_t count, DType dtype, bool stepwise),
                  (gate, up, count, dtype, stepwise))

void geglu(void* out, const void* gate, std::int64_t gate_stride, const void* up, std::int64_t up_stride,
           std::int64_t rows, std::int64_t columns, DType dtype, bool stepwise) {
  if (rows < 0 || columns < 0)
    throw std::invalid_argument("'rows' and 'columns' must not be negative, got " + std::to_string(rows) + " and " +
                                std::to_string(columns));
  const std::int64_t size = item_size(dtype), tiles = (columns + kTile - 1) / kTile;
  parallel(rows * tiles, 8, [&](std::int64_t first, std::int64_t last) {
    alignas(64) float gates[kTile], ups[kTile];
    for (std::int64_t tile = first; tile < last; ++tile) {
      const std::int64_t row = tile / tiles, left = tile % tiles * kTile;
      const std::int64_t width = std::min(kTile, columns - left);
      widen({static_cast<const char*>(gate), dtype}, row * gate_stride + left, width, gates);
      widen({static_cast<const char*>(up), dtype}, row * up_stride + left, width, ups);
      activate(gates, ups, width, dtype, stepwise);
      narrow(gates, width, dtype, static_cast<char*>(out) + (row * columns + left) * size);
    }
  });
}

}  // namespace arcmerge
