// attention_decode: reads keys and values at the bandwidth of memory, in splits of a fixed size whose results are
// combined in order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/gemma2/rope_cache.h"
#include "cpu/gemma2/softmax.h"
#include "cpu/matmul/gemv.h"
#include "cpu/simd/fma.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "cpu/system/thread_pool.h"

namespace arcmerge {
namespace {

// The keys of a split. With a head_dim of 256 its keys and values take half a megabyte, and 30 us.
constexpr std::int64_t kSplitKeys = 512;

// Positions [first, last) of one head of keys of a sequence.
struct Split {
  std::int64_t sequence, head, first, last;
};

// ---- sums of values, by 32-bit words; a word of bf16 belongs to two sums, of even and of odd elements

constexpr int kUnroll = 8;

template <class Isa, DType dtype>
struct Word {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  static constexpr int kSums = dtype == DType::bf16 ? 2 : 1;
  F32 value[kSums];

  inline void load(const char* address) {
    U32 words;
    std::memcpy(&words, address, sizeof words);
    if constexpr (dtype == DType::bf16) {
      value[0] = (F32)(words << 16);
      value[1] = (F32)(words & 0xffff0000u);
    } else {
      value[0] = (F32)words;
    }
  }
};

// sums[head][parity][word] += weights[head][key] * values[key][word], for kRows keys.
template <class Isa, DType dtype, int kRows>
inline void add_rows(float* sums, const char* value, std::int64_t words, const float* weights, std::int64_t group) {
  using W = Word<Isa, dtype>;
  using F32 = typename W::F32;
  constexpr std::int64_t kWidth = Isa::kBytes / 4;
  for (std::int64_t word = 0; word < words; word += kWidth) {
    W row[kRows];
    for (int i = 0; i < kRows; ++i) {
      row[i].load(value + (i * words + word) * 4);
      __builtin_prefetch(value + (kRows * words + word * kRows) * 4 + i * Isa::kBytes);
    }
    for (std::int64_t head = 0; head < group; ++head)
      for (int part = 0; part < W::kSums; ++part) {
        float* address = sums + (head * W::kSums + part) * words + word;
        F32 sum;
        std::memcpy(&sum, address, sizeof sum);
        for (int i = 0; i < kRows; ++i)
          sum = Fma<Isa>::multiply_add(row[i].value[part], broadcast<Isa>(weights[head * kSplitKeys + i]), sum);
        std::memcpy(address, &sum, sizeof sum);
      }
  }
}

template <class Isa, DType dtype>
inline void add_values(float* sums, const char* value, std::int64_t keys, std::int64_t words, const float* weights,
                       std::int64_t group) {
  std::int64_t key = 0;
  for (; key + kUnroll <= keys; key += kUnroll)
    add_rows<Isa, dtype, kUnroll>(sums, value + key * words * 4, words, weights + key, group);
  for (; key < keys; ++key) add_rows<Isa, dtype, 1>(sums, value + key * words * 4, words, weights + key, group);
}

// Heads that do not fill the registers of a variant use the narrowest registers.
template <class Isa, DType dtype>
inline void add_values_any_width(float* sums, const char* value, std::int64_t keys, std::int64_t words,
                                 const float* weights, std::int64_t group) {
  if (words % (Isa::kBytes / 4) == 0)
    add_values<Isa, dtype>(sums, value, keys, words, weights, group);
  else
    add_values<Baseline, dtype>(sums, value, keys, words, weights, group);
}

template <class Isa>
inline void add_bf16_values_body(float* sums, const char* value, std::int64_t keys, std::int64_t words,
                                 const float* weights, std::int64_t group) {
  add_values_any_width<Isa, DType::bf16>(sums, value, keys, words, weights, group);
}

template <class Isa>
inline void add_f32_values_body(float* sums, const char* value, std::int64_t keys, std::int64_t words,
                                const float* weights, std::int64_t group) {
  add_values_any_width<Isa, DType::f32>(sums, value, keys, words, weights, group);
}

ARCMERGE_VARIANTS(void, add_bf16_values,
                  (float* sums, const char* value, std::int64_t keys, std::int64_t words, const float* weights,
                   std::int64_t group),
                  (sums, value, keys, words, weights, group))
ARCMERGE_VARIANTS(void, add_f32_values,
                  (float* sums, const char* value, std::int64_t keys, std::int64_t words, const float* weights,
                   std::int64_t group),
                  (sums, value, keys, words, weights, group))

// out[i] = the sum over splits s of factors[s] * sums[s * stride + i].
template <class>
ARCMERGE_INLINE void combine_splits_body(float* out, const float* sums, std::int64_t stride, const float* factors,
                                         std::int64_t splits, std::int64_t count) {
  std::fill_n(out, count, 0.0f);
  for (std::int64_t split = 0; split < splits; ++split)
    for (std::int64_t i = 0; i < count; ++i) out[i] += factors[split] * sums[split * stride + i];
}

ARCMERGE_VARIANTS(void, combine_splits,
                  (float* out, const float* sums, std::int64_t stride, const float* factors, std::int64_t splits,
                   std::int64_t count),
                  (out, sums, stride, factors, splits, count))

// ---- the operation

// The arguments of a call and the results of its splits.
struct Decode {
  const KvCache& cache;
  ScoreParameters scoring;
  std::int64_t heads, group, head_bytes;
  std::vector<char> query;  // [sequences][heads], rotated
  std::vector<Split> splits;
  std::unique_ptr<float[]> sums;  // [split][head of the group][parity][word]
  std::vector<SoftmaxStatistics> statistics;

  std::int64_t dim() const { return cache.head_dim; }
};

// Calls body(first, count) for each range of positions of a split that is contiguous in the ring of slots.
template <class Body>
void for_ranges(const Split& split, std::int64_t slots, const Body& body) {
  for (std::int64_t first = split.first, next; first < split.last; first = next) {
    next = std::min(split.last, (first / slots + 1) * slots);
    body(first, next - first);
  }
}

void attend(Decode& decode, std::int64_t index) {
  const Split& split = decode.splits[index];
  const KvCache& cache = decode.cache;
  const std::int64_t group = decode.group, keys = split.last - split.first;
  std::vector<float> products(kSplitKeys * group), weights(kSplitKeys * group);
  const char* query = decode.query.data() + (split.sequence * decode.heads + split.head * group) * decode.head_bytes;
  for_ranges(split, cache.slots, [&](std::int64_t first, std::int64_t count) {
    gemv(cache.key + cache.offset(split.sequence, split.head, first), count, query, group, cache.head_dim, cache.dtype,
         products.data() + (first - split.first) * group);
  });
  for (std::int64_t head = 0; head < group; ++head) {
    float* row = weights.data() + head * kSplitKeys;
    for (std::int64_t key = 0; key < keys; ++key) row[key] = products[key * group + head];
    decode.statistics[index * group + head] = softmax_row(row, keys, decode.scoring, cache.dtype);
  }
  float* sums = decode.sums.get() + index * group * decode.dim();
  std::fill_n(sums, group * decode.dim(), 0.0f);
  for_ranges(split, cache.slots, [&](std::int64_t first, std::int64_t count) {
    (cache.dtype == DType::f32 ? add_f32_values : add_bf16_values)(
        sums, cache.value + cache.offset(split.sequence, split.head, first), count, decode.head_bytes / 4,
        weights.data() + (first - split.first), group);
  });
}

// Combines splits [first, first + count), all splits of one head of keys, for the query heads that share it.
void combine(const Decode& decode, std::int64_t first, std::int64_t count, char* out) {
  const std::int64_t dim = decode.dim(), group = decode.group, words = decode.head_bytes / 4, parts = dim / words;
  std::vector<float> factors(count), mixed(dim), row(dim);
  for (std::int64_t head = 0; head < group; ++head) {
    const auto statistics = [&](std::int64_t split) { return decode.statistics[(first + split) * group + head]; };
    float max = kLowest, sum = 0;
    for (std::int64_t split = 0; split < count; ++split) max = std::max(max, statistics(split).max);
    for (std::int64_t split = 0; split < count; ++split) {
      factors[split] = std::exp2(statistics(split).max - max);
      sum += factors[split] * statistics(split).sum;
    }
    combine_splits(mixed.data(), decode.sums.get() + (first * group + head) * dim, group * dim, factors.data(), count,
                   dim);
    for (std::int64_t i = 0; i < dim; ++i) row[i] = mixed[i % parts * words + i / parts] / sum;
    narrow(row.data(), dim, decode.cache.dtype, out + head * decode.head_bytes);
  }
}

}  // namespace

void attention_decode(void* out, const void* qkv, std::int64_t heads, const void* table, DType table_dtype,
                      const std::int32_t* lengths, const KvCache& cache, double scale, double softcap,
                      std::int64_t window) {
  require_cache(cache, heads);
  const std::int64_t head_bytes = cache.head_dim * item_size(cache.dtype), all_heads = heads + 2 * cache.heads;
  Decode decode{
      cache, score_parameters(scale, softcap, window), heads, heads / cache.heads, head_bytes, {}, {}, nullptr, {}};
  decode.query.resize(cache.sequences * heads * head_bytes);
  for (std::int64_t sequence = 0; sequence < cache.sequences; ++sequence) {
    const std::int64_t length = lengths[sequence];
    if (length == 0) continue;
    const char* states = static_cast<const char*>(qkv) + sequence * all_heads * head_bytes;
    const char* angles = static_cast<const char*>(table) + (length - 1) * cache.head_dim * item_size(table_dtype);
    for (std::int64_t head = 0; head < heads; ++head)
      rotate(decode.query.data() + (sequence * heads + head) * head_bytes, states + head * head_bytes, cache.dtype,
             angles, table_dtype, cache.head_dim);
    for (std::int64_t head = 0; head < cache.heads; ++head) {
      const std::int64_t offset = cache.offset(sequence, head, length - 1);
      rotate(cache.key + offset, states + (heads + head) * head_bytes, cache.dtype, angles, table_dtype,
             cache.head_dim);
      std::memcpy(cache.value + offset, states + (heads + cache.heads + head) * head_bytes, head_bytes);
      const std::int64_t first_seen = std::max<std::int64_t>(0, length - std::int64_t(decode.scoring.window));
      for (std::int64_t first = first_seen / kSplitKeys * kSplitKeys; first < length; first += kSplitKeys)
        decode.splits.push_back({sequence, head, std::max(first, first_seen), std::min(first + kSplitKeys, length)});
    }
  }
  const std::int64_t splits = decode.splits.size();
  decode.sums.reset(new float[splits * decode.group * cache.head_dim]);
  decode.statistics.resize(splits * decode.group);
  parallel(splits, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t index = first; index < last; ++index) attend(decode, index);
  });

  std::vector<std::int64_t> begin(cache.sequences * cache.heads + 1);
  for (const Split& split : decode.splits) ++begin[split.sequence * cache.heads + split.head + 1];
  for (std::size_t i = 1; i < begin.size(); ++i) begin[i] += begin[i - 1];
  parallel(cache.sequences * cache.heads, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      char* target = static_cast<char*>(out) + i * decode.group * head_bytes;
      if (begin[i] == begin[i + 1])
        std::memset(target, 0, decode.group * head_bytes);
      else
        combine(decode, begin[i], begin[i + 1] - begin[i], target);
    }
  });
}

}  // namespace arcmerge
