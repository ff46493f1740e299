#include "cpu/selection/selection.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/simd/convert.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

constexpr std::uint32_t kSignless = 0x7fffffff;

template <class>
ARCMERGE_INLINE void subtract_body(float* x, const float* base, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) x[e] -= base[e];
}

// Works on whole registers, as all below that use them: tiles have room after their last element.
template <class Isa>
ARCMERGE_INLINE void codes_of_body(const float* magnitudes, bool rounded, std::int64_t count, std::uint32_t* codes) {
  for (std::int64_t e = 0; e < count; e += Isa::kBytes / 4) {
    typename Vector<Isa>::F32 magnitude;
    std::memcpy(&magnitude, magnitudes + e, sizeof magnitude);
    const typename Vector<Isa>::U32 found = rounded ? rounded_code<Isa>(magnitude) & 0xffff0000u : code<Isa>(magnitude);
    std::memcpy(codes + e, &found, sizeof found);
  }
}

// The differences of bf16 operands in place, and their codes.
template <class Isa>
ARCMERGE_INLINE void read_bf16_body(const char* x, const char* base, bool rounded, std::int64_t count,
                                    float* differences, std::uint32_t* codes) {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  constexpr std::int64_t kStep = Isa::kBytes / 4;
  const auto widened = [](const char* at) {
    typename Vector<Isa>::HalfU16 halves;
    std::memcpy(&halves, at, sizeof halves);
    return (F32)(__builtin_convertvector(halves, U32) << 16);
  };
  const auto step = [&](const char* x_at, const char* base_at, std::int64_t e) {
    const F32 difference = widened(x_at) - widened(base_at);
    const U32 found = rounded ? rounded_code<Isa>(difference) & 0xffff0000u : code<Isa>(difference);
    std::memcpy(differences + e, &difference, sizeof difference);
    std::memcpy(codes + e, &found, sizeof found);
  };
  std::int64_t e = 0;
  for (; e + kStep <= count; e += kStep) step(x + 2 * e, base + 2 * e, e);
  if (e == count) return;
  char last_x[2 * kStep] = {}, last_base[2 * kStep] = {};
  std::memcpy(last_x, x + 2 * e, 2 * (count - e));
  std::memcpy(last_base, base + 2 * e, 2 * (count - e));
  step(last_x, last_base, e);
}

template <class>
ARCMERGE_INLINE void scale_body(float* out, const float* x, float scale, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) out[e] = float_of(bits_of(x[e]) & kSignless) * scale;
}

// The sums of differences, their mean, the sums of squares around it, and their mean.
template <class>
ARCMERGE_INLINE void add_body(float* sum, const float* x, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) sum[e] += x[e];
}
template <class>
ARCMERGE_INLINE void divide_body(float* sum, float k, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) sum[e] /= k;
}
template <class>
ARCMERGE_INLINE void square_body(float* sum, const float* x, const float* mean, bool adds, std::int64_t count) {
  for (std::int64_t e = 0; e < count; ++e) {
    const float square = (x[e] - mean[e]) * (x[e] - mean[e]);
    sum[e] = adds ? sum[e] + square : square;
  }
}

template <class>
ARCMERGE_INLINE std::int64_t count_equal_body(const std::uint32_t* codes, std::uint32_t code, std::int64_t count) {
  std::int32_t equal = 0;
  for (std::int64_t e = 0; e < count; ++e) equal += codes[e] == code;
  return equal;
}

ARCMERGE_VARIANTS(void, subtract, (float* x, const float* base, std::int64_t count), (x, base, count))
ARCMERGE_VARIANTS(void, codes_of, (const float* magnitudes, bool rounded, std::int64_t count, std::uint32_t* codes),
                  (magnitudes, rounded, count, codes))
ARCMERGE_VARIANTS(void, read_bf16,
                  (const char* x, const char* base, bool rounded, std::int64_t count, float* differences,
                   std::uint32_t* codes),
                  (x, base, rounded, count, differences, codes))
ARCMERGE_VARIANTS(void, scale, (float* out, const float* x, float scale, std::int64_t count), (out, x, scale, count))
ARCMERGE_VARIANTS(void, add, (float* sum, const float* x, std::int64_t count), (sum, x, count))
ARCMERGE_VARIANTS(void, divide, (float* sum, float k, std::int64_t count), (sum, k, count))
ARCMERGE_VARIANTS(void, square, (float* sum, const float* x, const float* mean, bool adds, std::int64_t count),
                  (sum, x, mean, adds, count))
ARCMERGE_VARIANTS(std::int64_t, count_equal, (const std::uint32_t* codes, std::uint32_t code, std::int64_t count),
                  (codes, code, count))

}  // namespace

// ---- differences and codes

Differences::Differences(const std::vector<Operand>& operands, const Operand& base, const Selection& selection)
    : operands_(operands),
      base_operand_(base),
      selection_(selection),
      differences_(operands.size()),
      codes_(selection.joint ? 1 : operands.size()) {}

void Differences::read(std::int64_t first, std::int64_t count) {
  const bool in_place = !selection_.joint && !selection_.row_scales && is_plain_bf16(base_operand_);
  bool has_base = false;
  for (std::size_t i = 0; i < size(); ++i) {
    if (in_place && is_plain_bf16(operands_[i])) {
      read_bf16(operands_[i].address + 2 * first, base_operand_.address + 2 * first, selection_.rounded, count,
                differences_[i].of, codes_[i].of);
      continue;
    }
    if (!has_base) read_base(first, count);
    has_base = true;
    widen(operands_[i], first, count, differences_[i].of);
    subtract(differences_[i].of, base_.of, count);
    if (!selection_.joint) encode(differences_[i].of, first, count, codes_[i].of);
  }
  if (!selection_.joint) return;
  mean_ = differences_[0];
  for (std::size_t i = 1; i < size(); ++i) add(mean_.of, differences_[i].of, count);
  divide(mean_.of, float(size()), count);
  Tile<float> variance;
  for (std::size_t i = 0; i < size(); ++i) square(variance.of, differences_[i].of, mean_.of, i > 0, count);
  divide(variance.of, float(size()), count);
  encode(variance.of, first, count, codes_[0].of);
}

void Differences::encode(const float* magnitudes, std::int64_t first, std::int64_t count, std::uint32_t* codes) {
  if (selection_.row_scales) {
    const std::int64_t columns = selection_.columns;
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t row = (first + done) / columns;
      const std::int64_t span = std::min(count - done, (row + 1) * columns - (first + done));
      scale(magnitudes_.of + done, magnitudes + done, selection_.row_scales[row], span);
      done += span;
    }
    magnitudes = magnitudes_.of;
  }
  codes_of(magnitudes, selection_.rounded, count, codes);
}

// ---- cuts

Cuts::Cuts(const Selection::Cut& cut, const EqualsBefore& before, std::int64_t count)
    : above_{cut.upper, std::max<std::int64_t>(cut.upper_rank - before.first, 0)},
      inside_{cut.lower, std::max<std::int64_t>(cut.lower_rank - before.second, 0)},
      left_(count) {}

Cuts::Bounds Cuts::between(std::int64_t low, std::int64_t high) {
  constexpr std::int64_t kMax = kSignless;
  if (low > kMax) return {0, -1};
  return {std::int32_t(std::max<std::int64_t>(low, 0)), std::int32_t(std::clamp<std::int64_t>(high, -1, kMax))};
}

std::int32_t Cuts::counted(const Equals& equals) const {
  const bool is_code = equals.code >= 0 && equals.code <= std::int64_t(kSignless);
  return is_code && equals.left > 0 && equals.left < left_ ? std::int32_t(equals.code) : -1;
}

void Cuts::advance(std::int64_t with_upper, std::int64_t with_lower, std::int64_t count) {
  above_.left -= with_upper;
  inside_.left -= with_lower;
  left_ -= count;
}

Cuts::Bounds Cuts::next(const std::uint32_t* codes, std::int64_t count, const std::uint16_t*& kept,
                        std::uint16_t* changed) {
  const auto found = [&](std::int32_t code) { return code < 0 ? 0 : count_equal(codes, std::uint32_t(code), count); };
  const std::int64_t with_upper = found(upper()), with_lower = found(lower());
  if (!splits(with_upper, with_lower)) {
    const Bounds together = bounds();
    advance(with_upper, with_lower, count);
    return together;
  }
  if (kept != changed) std::copy(kept, kept + count, changed);
  kept = changed;
  for (std::int64_t e = 0; e < count; ++e) {
    if (codes[e] == above_.code && above_.left > 0) {
      --above_.left;
      changed[e] = 0;
    }
    if (codes[e] == inside_.code) {
      if (inside_.left > 0)
        --inside_.left;
      else
        changed[e] = 0;
    }
  }
  left_ -= count;
  return between(inside_.code, above_.code);
}

// ---- arguments

void require_each(const char* name, std::size_t entries, std::size_t k) {
  if (entries != k)
    throw std::invalid_argument(std::string("'") + name + "' must be as many as the operands (" + std::to_string(k) +
                                "), got " + std::to_string(entries));
}

void require_selection(const std::vector<Operand>& operands, const Selection& selection, std::int64_t first,
                       std::int64_t count) {
  if (operands.empty()) throw std::invalid_argument("'operands' must have 1 or more entries, got 0");
  require_range(first, count);
  require_each("keys", selection.keys.size(), operands.size());
  require_each("probabilities", selection.probabilities.size(), operands.size());
  if (!selection.masks.empty()) require_each("masks", selection.masks.size(), operands.size());
  if (count > 0 && selection.columns < 1)
    throw std::invalid_argument("'columns' must be 1 or more, got " + std::to_string(selection.columns));
  // Ranks are int32.
  if (selection.columns >> 31)
    for (const auto& [first_chance, last_chance] : selection.probabilities)
      if (first_chance != last_chance)
        throw std::invalid_argument("'columns' must be below 2^31 for probabilities by rank, got " +
                                    std::to_string(selection.columns));
}

}  // namespace arcmerge
