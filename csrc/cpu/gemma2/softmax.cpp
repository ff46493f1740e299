#include "cpu/gemma2/softmax.h"

#include <cstring>

#include "cpu/simd/constants.h"
#include "cpu/simd/exp_tanh.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

template <class T, class Address>
inline T load(const Address* address) {
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

// f32 rounded to bf16, in the low halves of words. A NaN is not kept quiet, but weights are NaN only if the result is.
template <class U32>
inline U32 to_bf16_words(const U32& bits) {
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// The score of a product, times log2(e).
template <class Isa>
struct Score {
  using F32 = typename Vector<Isa>::F32;
  float inner, outer;

  explicit inline Score(const ScoreParameters& scoring)
      : inner(scoring.softcap ? scoring.scale / scoring.softcap : scoring.scale * kLog2E),
        outer(scoring.softcap * kLog2E) {}

  inline F32 operator()(const F32& product) const {
    const F32 score = product * inner;
    return outer ? tanh<Isa>(score) * outer : score;
  }
};

template <class Isa>
inline void softmax_block_body(std::uint32_t* weights, float* products, std::int64_t keys, std::int64_t columns,
                               std::int64_t first, const std::int32_t* positions, const ScoreParameters& scoring,
                               const RunningSoftmax& running, DType dtype) {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  constexpr std::int64_t kWidth = Isa::kBytes / 4;
  const Score<Isa> score_of(scoring);
  for (std::int64_t j = 0; j < columns; j += kWidth) {
    const U32 position = load<U32>(positions + j);
    const F32 before = load<F32>(running.max + j);
    F32 max = before, sum{};
    for (std::int64_t key = 0; key < keys; ++key) {
      F32 score = score_of(load<F32>(products + key * columns + j));
      const U32 age = position - std::uint32_t(first + key);  // of a later key it wraps around and exceeds every window
      score = age < scoring.window ? score : F32{} - __builtin_inff();
      max = score > max ? score : max;
      std::memcpy(products + key * columns + j, &score, sizeof score);
    }
    const auto weight = [&](std::int64_t key) {
      const F32 power = exp2<Isa>(load<F32>(products + key * columns + j) - max);
      sum += power;
      return (U32)power;
    };
    if (dtype == DType::f32) {
      for (std::int64_t key = 0; key < keys; ++key) {
        const U32 word = weight(key);
        std::memcpy(weights + key * columns + j, &word, sizeof word);
      }
    } else {
      for (std::int64_t key = 0; key < keys; key += 2) {
        U32 word = to_bf16_words(weight(key));
        if (key + 1 < keys) word |= to_bf16_words(weight(key + 1)) << 16;
        std::memcpy(weights + key / 2 * columns + j, &word, sizeof word);
      }
    }
    const F32 factor = exp2<Isa>(before - max);
    const F32 total = load<F32>(running.sum + j) * factor + sum;
    std::memcpy(running.max + j, &max, sizeof max);
    std::memcpy(running.factor + j, &factor, sizeof factor);
    std::memcpy(running.sum + j, &total, sizeof total);
  }
}

template <class Isa>
inline SoftmaxStatistics softmax_row_body(float* products, std::int64_t keys, const ScoreParameters& scoring,
                                          DType dtype) {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  constexpr std::int64_t kWidth = Isa::kBytes / 4;
  const Score<Isa> score_of(scoring);
  F32 max = F32{} + kLowest, sum{};
  for (std::int64_t key = 0; key < keys; key += kWidth) {
    F32 score = score_of(load<F32>(products + key));
    for (std::int64_t j = keys - key; j < kWidth; ++j) score[j] = -__builtin_inff();
    max = score > max ? score : max;
    std::memcpy(products + key, &score, sizeof score);
  }
  SoftmaxStatistics row{max[0], 0};
  for (int j = 1; j < kWidth; ++j) row.max = max[j] > row.max ? max[j] : row.max;
  for (std::int64_t key = 0; key < keys; key += kWidth) {
    F32 weight = exp2<Isa>(load<F32>(products + key) - row.max);
    sum += weight;
    if (dtype == DType::bf16) weight = (F32)(to_bf16_words((U32)weight) << 16);
    std::memcpy(products + key, &weight, sizeof weight);
  }
  for (int j = 0; j < kWidth; ++j) row.sum += sum[j];
  return row;
}

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
inline SoftmaxStatistics logit_statistics_body(const float* logits, std::int64_t count) {
  using F32 = typename Vector<Isa>::F32;
  constexpr int kWidth = Isa::kBytes / 4;
  const auto load = [&](std::int64_t i) {
    F32 value;
    std::memcpy(&value, logits + i, sizeof value);
    return value;
  };
  F32 max = F32{} - __builtin_inff(), sums{};
  for (std::int64_t i = 0; i < count; i += kWidth) max = load(i) > max ? load(i) : max;
  SoftmaxStatistics found{max[0], 0};
  for (int j = 1; j < kWidth; ++j) found.max = max[j] > found.max ? max[j] : found.max;
  for (std::int64_t i = 0; i < count; i += kWidth) sums += exp2<Isa>((load(i) - found.max) * kLog2E);
  for (int j = 0; j < kWidth; ++j) found.sum += sums[j];
  return found;
}

}  // namespace

ARCMERGE_VARIANTS(SoftmaxStatistics, softmax_row,
                  (float* products, std::int64_t keys, const ScoreParameters& scoring, DType dtype),
                  (products, keys, scoring, dtype))
ARCMERGE_VARIANTS(void, softmax_block,
                  (std::uint32_t* weights, float* products, std::int64_t keys, std::int64_t columns, std::int64_t first,
                   const std::int32_t* positions, const ScoreParameters& scoring, const RunningSoftmax& running,
                   DType dtype),
                  (weights, products, keys, columns, first, positions, scoring, running, dtype))
ARCMERGE_VARIANTS(void, cap_logits, (float* logits, std::int64_t count, float softcap), (logits, count, softcap))
ARCMERGE_VARIANTS(SoftmaxStatistics, logit_statistics, (const float* logits, std::int64_t count), (logits, count))

}  // namespace arcmerge
