#include "cpu/gemma2/logits.h"

#include <cstring>

#include "cpu/simd/exponential.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

template <class Isa>
inline void cap_logits_body(float* logits, std::int64_t count, float softcap) {
  for (std::int64_t i = 0; i < count; i += Isa::kBytes / 4) {
    typename Vector<Isa>::F32 logit;
    std::memcpy(&logit, logits + i, sizeof logit);
    logit = tanh<Isa>(logit / softcap) * softcap;
    std::memcpy(logits + i, &logit, sizeof logit);
  }
}

template <class Isa>
inline Extremes extremes_body(const float* logits, std::int64_t count) {
  using F32 = typename Vector<Isa>::F32;
  constexpr int kWidth = Isa::kBytes / 4;
  const auto load = [&](std::int64_t i) {
    F32 value;
    std::memcpy(&value, logits + i, sizeof value);
    return value;
  };
  F32 most = F32{} - __builtin_inff(), sums{};
  for (std::int64_t i = 0; i < count; i += kWidth) most = load(i) > most ? load(i) : most;
  Extremes found{most[0], 0};
  for (int j = 1; j < kWidth; ++j) found.greatest = most[j] > found.greatest ? most[j] : found.greatest;
  for (std::int64_t i = 0; i < count; i += kWidth) sums += power_of_two<Isa>((load(i) - found.greatest) * kLog2E);
  for (int j = 0; j < kWidth; ++j) found.sum += sums[j];
  return found;
}

}  // namespace

ARCMERGE_VARIANTS(void, cap_logits, (float* logits, std::int64_t count, float softcap), (logits, count, softcap))
ARCMERGE_VARIANTS(Extremes, extremes, (const float* logits, std::int64_t count), (logits, count))

}  // namespace arcmerge
