#include "cpu/gemma2/softmax.h"

#include <cstring>

#include "cpu/simd/exponential.h"
#include "cpu/simd/variant.h"

namespace arcmerge {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

template <class T, class Address>
inline T load(const Address* address) {
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

// f32 rounded to bf16, in the low halves. Weights are not NaN unless the result is to be.
template <class U32>
inline U32 to_bf16_words(const U32& bits) {
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// From a product to a score, times log2(e).
template <class Isa>
struct Score {
  using F32 = typename Vector<Isa>::F32;
  float inner, outer;

  explicit inline Score(const Sight& sight)
      : inner(sight.softcap ? sight.scale / sight.softcap : sight.scale * kLog2E), outer(sight.softcap * kLog2E) {}

  inline F32 operator()(const F32& product) const {
    const F32 score = product * inner;
    return outer ? tanh<Isa>(score) * outer : score;
  }
};

template <class Isa>
inline void softmax_block_body(std::uint32_t* weights, float* products, std::int64_t keys, std::int64_t columns,
                               std::int64_t first, const std::int32_t* positions, const Sight& sight,
                               const Columns& so_far, DType dtype) {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  constexpr std::int64_t kWidth = Isa::kBytes / 4;
  const Score<Isa> score_of(sight);
  for (std::int64_t j = 0; j < columns; j += kWidth) {
    const U32 position = load<U32>(positions + j);
    const F32 before = load<F32>(so_far.greatest + j);
    F32 greatest = before, sum{};
    for (std::int64_t key = 0; key < keys; ++key) {
      F32 score = score_of(load<F32>(products + key * columns + j));
      const U32 age = position - std::uint32_t(first + key);  // of a later key: more than any reach
      score = age < sight.reach ? score : F32{} - __builtin_inff();
      greatest = score > greatest ? score : greatest;
      std::memcpy(products + key * columns + j, &score, sizeof score);
    }
    const auto weight = [&](std::int64_t key) {
      const F32 power = power_of_two<Isa>(load<F32>(products + key * columns + j) - greatest);
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
    const F32 factor = power_of_two<Isa>(before - greatest);
    const F32 total = load<F32>(so_far.sums + j) * factor + sum;
    std::memcpy(so_far.greatest + j, &greatest, sizeof greatest);
    std::memcpy(so_far.factors + j, &factor, sizeof factor);
    std::memcpy(so_far.sums + j, &total, sizeof total);
  }
}

template <class Isa>
inline Statistics softmax_row_body(float* products, std::int64_t keys, const Sight& sight, DType dtype) {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  constexpr std::int64_t kWidth = Isa::kBytes / 4;
  const Score<Isa> score_of(sight);
  F32 most = F32{} + kNone, sum{};
  for (std::int64_t key = 0; key < keys; key += kWidth) {
    F32 score = score_of(load<F32>(products + key));
    for (std::int64_t j = keys - key; j < kWidth; ++j) score[j] = -__builtin_inff();
    most = score > most ? score : most;
    std::memcpy(products + key, &score, sizeof score);
  }
  Statistics row{most[0], 0};
  for (int j = 1; j < kWidth; ++j) row.greatest = most[j] > row.greatest ? most[j] : row.greatest;
  for (std::int64_t key = 0; key < keys; key += kWidth) {
    F32 weight = power_of_two<Isa>(load<F32>(products + key) - row.greatest);
    sum += weight;
    if (dtype == DType::bf16) weight = (F32)(to_bf16_words((U32)weight) << 16);
    std::memcpy(products + key, &weight, sizeof weight);
  }
  for (int j = 0; j < kWidth; ++j) row.sum += sum[j];
  return row;
}

}  // namespace

ARCMERGE_VARIANTS(Statistics, softmax_row, (float* products, std::int64_t keys, const Sight& sight, DType dtype),
                  (products, keys, sight, dtype))
ARCMERGE_VARIANTS(void, softmax_block,
                  (std::uint32_t* weights, float* products, std::int64_t keys, std::int64_t columns, std::int64_t first,
                   const std::int32_t* positions, const Sight& sight, const Columns& so_far, DType dtype),
                  (weights, products, keys, columns, first, positions, sight, so_far, dtype))

}  // namespace arcmerge
