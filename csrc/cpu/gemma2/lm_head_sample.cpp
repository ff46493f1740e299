// lm_head_draw: samples from the softmax by taking the largest of noisy scores (Gumbel 1954), with noise from
// Philox-4x32-10 (Salmon et al. 2011).
//
// The noise is -log(-log(1 - v)) for a uniform v. Two logarithms take 20 ns, and hardly any id needs them: if 2^e is
// the power of two below v, the noise is at most -e log(2). This bound, from integer arithmetic, finds the few ids that
// may exceed the best one so far.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/simd/convert.h"
#include "cpu/simd/variant.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

// The ids of a unit of work, and the ids whose noise is computed together.
constexpr std::int64_t kChunkIds = 8192, kBatchIds = 64;

ARCMERGE_INLINE void multiply(std::uint32_t a, std::uint32_t b, std::uint32_t& high, std::uint32_t& low) {
  const std::uint64_t product = std::uint64_t(a) * b;
  high = std::uint32_t(product >> 32);
  low = std::uint32_t(product);
}

// values[i]: uniform in (0, 1) for id first + i. bounds[i]: an upper bound of scores[i] plus its noise.
template <class>
ARCMERGE_INLINE void uniform_body(float* values, float* bounds, const float* scores, std::uint32_t first,
                                  std::uint64_t seed, std::uint64_t step) {
  std::uint32_t c0[kBatchIds], c1[kBatchIds], c2[kBatchIds], c3[kBatchIds];
  for (std::int64_t i = 0; i < kBatchIds; ++i) {
    c0[i] = first + std::uint32_t(i);
    c1[i] = std::uint32_t(step);
    c2[i] = std::uint32_t(step >> 32);
    c3[i] = 0;
  }
  std::uint32_t low = std::uint32_t(seed), high = std::uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, low += 0x9e3779b9, high += 0xbb67ae85)
    for (std::int64_t i = 0; i < kBatchIds; ++i) {
      std::uint32_t high0, low0, high2, low2;
      multiply(0xd2511f53, c0[i], high0, low0);
      multiply(0xcd9e8d57, c2[i], high2, low2);
      c0[i] = high2 ^ c1[i] ^ low;
      c1[i] = low2;
      c2[i] = high0 ^ c3[i] ^ high;
      c3[i] = low0;
    }
  for (std::int64_t i = 0; i < kBatchIds; ++i) {
    const float value = (float(c0[i]) + 0.5f) * 0x1p-32f;
    values[i] = value < 1 ? value : 1 - 0x1p-24f;
    const std::int32_t exponent = std::int32_t(bits_of(values[i]) >> 23) - 127;
    bounds[i] = scores[i] - float(exponent) * 0.6931472f + 1e-3f;
  }
}

ARCMERGE_VARIANTS(void, uniform,
                  (float* values, float* bounds, const float* scores, std::uint32_t first, std::uint64_t seed,
                   std::uint64_t step),
                  (values, bounds, scores, first, seed, step))

struct Sample {
  float value = -std::numeric_limits<float>::infinity();
  std::int64_t id = 0;
};

Sample draw(const float* scores, std::int64_t first, std::int64_t last, std::uint64_t seed, std::uint64_t step) {
  Sample best{-std::numeric_limits<float>::infinity(), first};
  for (std::int64_t id = first; id < last; id += kBatchIds) {
    const std::int64_t count = std::min(kBatchIds, last - id);
    float values[kBatchIds], bounds[kBatchIds], padded[kBatchIds] = {};
    std::memcpy(padded, scores + id, count * sizeof(float));
    uniform(values, bounds, padded, std::uint32_t(id), seed, step);
    for (std::int64_t i = 0; i < count; ++i) {
      if (!(bounds[i] > best.value)) continue;
      const float value = padded[i] - std::log(-std::log1p(-values[i]));
      if (value > best.value) best = {value, id + i};
    }
  }
  return best;
}

}  // namespace

void lm_head_draw(std::int64_t* out, const float* scores, std::int64_t count, std::int64_t ids, std::uint64_t seed,
                  const std::int64_t* steps) {
  const std::int64_t chunks = (ids + kChunkIds - 1) / kChunkIds;
  std::vector<Sample> samples(count * chunks);
  parallel(count * chunks, 1, [&](std::int64_t unit, std::int64_t end) {
    for (; unit < end; ++unit) {
      const std::int64_t t = unit / chunks, first = unit % chunks * kChunkIds;
      samples[unit] = draw(scores + t * ids, first, std::min(first + kChunkIds, ids), seed, std::uint64_t(steps[t]));
    }
  });
  for (std::int64_t t = 0; t < count; ++t)
    out[t] =
        std::max_element(&samples[t * chunks], &samples[t * chunks] + chunks, [](const Sample& a, const Sample& b) {
          return a.value < b.value;
        })->id;
}

}  // namespace arcmerge
