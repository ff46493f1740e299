// row_divergences: how far the softmax of each row moved from that of the base, which scales a row's magnitudes.
//
// The divergence of two almost equal rows is about half the variance of their difference, 1e-9 and less, which the
// textbook sum of p log(p / q) loses to cancellation. With e = (base - x) - E_p[base - x] it is
// log1p(E_p[expm1(e) - e]), in which all terms are positive.
//
// Exponentials are computed here, because those of a C library depend on the processor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/simd/constants.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "merge.h"

namespace arcmerge {
namespace {

// 1 / n!
constexpr double kTaylor[] = {
    1,         1,          1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
    1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};

// The terms of the exponential series of x, for |x| <= 1/2, from x^first on, divided by x^first.
template <int first, class F64>
ARCMERGE_INLINE void series(F64& out, const F64& x) {
  out = F64{} + kTaylor[13];
  for (int n = 12; n >= first; --n) out = out * x + kTaylor[n];
}

// e^x within 2e-15 of it; 0 and infinity beyond the normal numbers.
template <class F64, class U64>
ARCMERGE_INLINE void exponential(F64& out, const F64& x) {
  constexpr double kRound = 6755399441055744;  // 1.5 * 2^52; the sum has the integer in its last bits
  const F64 shifted = x * 1.4426950408889634 + kRound, n = shifted - kRound;
  const F64 rest = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;  // n log(2) in two parts
  series<0>(out, rest);
  const F64 power = (F64)(((U64)shifted << 52) + 0x3ff0000000000000u);
  out = x < -708 ? F64{} : x > 709 ? F64{} + HUGE_VAL : out * power;
}

template <class Isa>
struct Row {
  using F64 = typename Vector<Isa>::F64;
  using U64 = typename Vector<Isa>::U64;
  static constexpr int kWidth = Isa::kBytes / 8, kParts = kLanes / kWidth;

  static ARCMERGE_INLINE void load(F64& to, const float* from) {
    typename Vector<Isa>::HalfF32 narrow;
    std::memcpy(&narrow, from, sizeof narrow);
    to = __builtin_convertvector(narrow, F64);
  }
  static ARCMERGE_INLINE double sum(const F64* parts) {
    double lanes[kLanes], total = 0;
    std::memcpy(lanes, parts, sizeof lanes);
    for (const double lane : lanes) total += lane;
    return total;
  }

  // Calls f(part, c) for each register of columns, which are added up in kLanes lanes.
  template <class F>
  static ARCMERGE_INLINE void for_each(std::int64_t padded, const F& f) {
    for (std::int64_t c = 0; c < padded; c += kLanes)
      for (int part = 0; part < kParts; ++part) f(part, c + part * kWidth);
  }
};

// E_p[expm1(e) - e], or NaN for rows that are not finite. x, base: padded to a multiple of kLanes by their first
// element.
template <class Isa>
ARCMERGE_INLINE double excess_of_body(const float* x, const float* base, std::int64_t padded, double* weights) {
  using Row = Row<Isa>;
  using F64 = typename Row::F64;
  using U64 = typename Row::U64;
  F64 here, from, weight, invalid[Row::kParts] = {}, largest[Row::kParts];
  for (F64& part : largest) part = F64{} + double(x[0]);
  Row::for_each(padded, [&](int part, std::int64_t c) ARCMERGE_LAMBDA {
    Row::load(here, x + c);
    Row::load(from, base + c);
    invalid[part] += (here - here) + (from - from);
    largest[part] = here > largest[part] ? here : largest[part];
  });
  if (std::isnan(Row::sum(invalid))) return std::nan("");
  double lanes[kLanes];
  std::memcpy(lanes, largest, sizeof lanes);
  const double maximum = *std::max_element(lanes, lanes + kLanes);

  Row::for_each(padded, [&](int, std::int64_t c) ARCMERGE_LAMBDA {
    Row::load(here, x + c);
    exponential<F64, U64>(weight, here - maximum);
    std::memcpy(weights + c, &weight, sizeof weight);
  });

  F64 totals[Row::kParts] = {}, means[Row::kParts] = {}, excesses[Row::kParts] = {};
  Row::for_each(padded, [&](int part, std::int64_t c) ARCMERGE_LAMBDA {
    Row::load(here, x + c);
    Row::load(from, base + c);
    std::memcpy(&weight, weights + c, sizeof weight);
    totals[part] += weight;
    means[part] += weight * (from - here);
  });
  const double total = Row::sum(totals), mean = Row::sum(means) / total;
  Row::for_each(padded, [&](int part, std::int64_t c) ARCMERGE_LAMBDA {
    Row::load(here, x + c);
    Row::load(from, base + c);
    std::memcpy(&weight, weights + c, sizeof weight);
    const F64 e = (from - here) - mean;
    F64 near, far;
    series<2>(near, e);
    exponential<F64, U64>(far, (from - maximum) - mean);  // weight * e^e, where e^e alone may overflow
    // By magnitude, because some compilers take AVX-512 apart for pairs of comparisons.
    excesses[part] += (F64)((U64)e & ~0ull >> 1) < 0.5 ? weight * (near * e * e) : far - weight * (1 + e);
  });
  return Row::sum(excesses) / total;
}

ARCMERGE_VARIANTS(double, excess_of, (const float* x, const float* base, std::int64_t padded, double* weights),
                  (x, base, padded, weights))

void read_row(const Operand& operand, std::int64_t first, std::int64_t columns, std::vector<float>& row) {
  std::fill(row.begin() + columns, row.end(), std::numeric_limits<float>::lowest());
  for (std::int64_t done = 0; done < columns; done += kTile)
    widen(operand, first + done, std::min(kTile, columns - done), row.data() + done);
}

}  // namespace

void row_divergences(float* out, const Operand& x, const Operand& base, std::int64_t columns, std::int64_t first_row,
                     std::int64_t rows) {
  require_matrix(rows, columns);
  require_range(first_row, rows);
  const std::int64_t padded = (columns + kLanes - 1) / kLanes * kLanes;
  std::vector<float> values(padded), base_values(padded);
  std::vector<double> weights(padded);
  for (std::int64_t row = 0; row < rows; ++row) {
    read_row(x, (first_row + row) * columns, columns, values);
    read_row(base, (first_row + row) * columns, columns, base_values);
    const double excess = excess_of(values.data(), base_values.data(), padded, weights.data());
    out[row] = float(std::log1p(excess < 0 ? 0 : excess));
  }
}

}  // namespace arcmerge
