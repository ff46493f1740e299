// lm_head_logprob and lm_head_scores. They read the weight once, in blocks of ids of a fixed size; of the logits of a
// block, lm_head_logprob keeps three numbers for each token.
//
// With few tokens they are bound by memory and read the weight row by row (gemv.cpp); with many they are bound by
// arithmetic, and tokens are columns (gemm.cpp). The last bits of a sum depend on which of the two computes it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/gemma2/softmax.h"
#include "cpu/matmul/gemm.h"
#include "cpu/matmul/gemv.h"
#include "cpu/matmul/transpose.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

// The ids of a block, whose logits for 48 tokens take 98 KB, twice; and the rows of the weight in one gemv.
constexpr std::int64_t kBlockIds = 512, kGemvRows = 32;
static_assert(kBlockIds % kLmHeadTile == 0, "a tile is in one block");
// The tokens whose results are kept at a time: 6 MB.
constexpr std::int64_t kMaxTokens = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void require_head(const LmHead& head) {
  if (head.count < 0 || head.length < 0 || head.ids < 1)
    throw std::invalid_argument("'head' must have tokens, columns and ids, got " + std::to_string(head.count) + ", " +
                                std::to_string(head.length) + " and " + std::to_string(head.ids));
}

// The logits of some tokens, by blocks of ids: [count][kBlockIds], -inf after the last id.
class LogitBlocks {
 public:
  // Tokens [first, first + count) of the head.
  LogitBlocks(const LmHead& head, std::int64_t first, std::int64_t count)
      : head_(head), count_(count), bytes_(head.length * item_size(head.dtype)), x_(head.x + first * bytes_) {
    if (head.count <= kMaxGemvRows || bytes_ % 4 != 0) return;
    packed_.resize(columns(count) * words());
    parallel(count, kColumns, [&](std::int64_t token, std::int64_t last) {
      for (; token < last; token += kColumns) {
        const std::int64_t group = std::min(kColumns, last - token);
        transpose(packed_.data() + token * words(), columns(group), x_ + token * bytes_, bytes_, group, words());
      }
    });
  }

  std::int64_t block_count() const { return (head_.ids + kBlockIds - 1) / kBlockIds; }

  // Calls body(block, token, logits) for every block and token, in any order.
  template <class Body>
  void for_each(const Body& body) const {
    const std::int64_t group = packed_.empty() ? kMaxGemvRows : kColumns;
    parallel(block_count(), 1, [&](std::int64_t block, std::int64_t last) {
      std::vector<float> logits(group * kBlockIds), sums(group * kBlockIds);
      for (; block < last; ++block)
        for (std::int64_t token = 0; token < count_; token += group) {
          const std::int64_t count = std::min(group, count_ - token),
                             ids = std::min(kBlockIds, head_.ids - block * kBlockIds);
          if (packed_.empty())
            with_gemv(logits.data(), sums.data(), block, token, count, ids);
          else
            with_gemm(logits.data(), sums.data(), block, token, count, ids);
          for (std::int64_t t = 0; t < count; ++t) {
            float* row = logits.data() + t * kBlockIds;
            if (head_.softcap) cap_logits(row, kBlockIds, head_.softcap);
            std::fill(row + ids, row + kBlockIds, -kInfinity);
            body(block, token + t, row);
          }
        }
    });
  }

 private:
  std::int64_t words() const { return bytes_ / 4; }
  static std::int64_t columns(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

  void with_gemv(float* logits, float* sums, std::int64_t block, std::int64_t token, std::int64_t count,
                 std::int64_t ids) const {
    for (std::int64_t id = 0; id < ids; id += kGemvRows) {
      const std::int64_t rows = std::min(kGemvRows, ids - id);
      gemv(head_.weight + (block * kBlockIds + id) * bytes_, rows, x_ + token * bytes_, count, head_.length,
           head_.dtype, sums);
      for (std::int64_t t = 0; t < count; ++t)
        for (std::int64_t row = 0; row < rows; ++row) logits[t * kBlockIds + id + row] = sums[row * count + t];
    }
  }

  void with_gemm(float* logits, float* sums, std::int64_t block, std::int64_t token, std::int64_t count,
                 std::int64_t ids) const {
    gemm(sums, {head_.weight + block * kBlockIds * bytes_, bytes_, 4}, ids, words(), packed_.data() + token * words(),
         columns(count), nullptr, head_.dtype);
    transpose(reinterpret_cast<std::uint32_t*>(logits), kBlockIds, sums, columns(count) * 4, ids, count);
  }

  const LmHead& head_;
  std::int64_t count_, bytes_;
  const char* x_;
  std::vector<std::uint32_t> packed_;  // [group of kColumns tokens][word][token], empty for gemv
};

// The result of a block of ids for one token.
struct Partial {
  SoftmaxStatistics statistics;
  std::int64_t best;
};

// The lowest id of the largest logit; 0 if no logit is above -inf.
std::int64_t argmax(const float* logits, float max) {
  return max == -kInfinity ? 0 : std::find(logits, logits + kBlockIds, max) - logits;
}

// Combines the results of `count` blocks, in the order of their ids: partials[0], partials[stride], and so on.
Partial combine_blocks(const Partial* partials, std::int64_t stride, std::int64_t count) {
  Partial all = partials[0];
  for (std::int64_t block = 1; block < count; ++block)
    if (partials[block * stride].statistics.max > all.statistics.max) all = partials[block * stride];
  all.statistics.sum = 0;
  for (std::int64_t block = 0; block < count; ++block) {
    const SoftmaxStatistics& one = partials[block * stride].statistics;
    all.statistics.sum += one.sum * std::exp(one.max - all.statistics.max);
  }
  return all;
}

}  // namespace

void lm_head_logprob(float* out, std::int64_t* best, const LmHead& head, const std::int64_t* ids) {
  require_head(head);
  for (std::int64_t first = 0; first < head.count; first += kMaxTokens) {
    const std::int64_t count = std::min(kMaxTokens, head.count - first);
    const LogitBlocks blocks(head, first, count);
    std::vector<Partial> partials(blocks.block_count() * count);
    std::vector<float> chosen(count);
    blocks.for_each([&](std::int64_t block, std::int64_t token, const float* logits) {
      const SoftmaxStatistics found = logit_statistics(logits, kBlockIds);
      partials[block * count + token] = {found, block * kBlockIds + argmax(logits, found.max)};
      if (ids && ids[first + token] / kBlockIds == block) chosen[token] = logits[ids[first + token] % kBlockIds];
    });
    for (std::int64_t token = 0; token < count; ++token) {
      const Partial all = combine_blocks(partials.data() + token, count, blocks.block_count());
      best[first + token] = all.best;
      if (ids)
        out[first + token] = float(double(chosen[token]) - all.statistics.max - std::log(double(all.statistics.sum)));
    }
  }
}

namespace {

void penalize(float* logits, std::int64_t count, const std::uint32_t* seen, float penalty) {
  for (std::int64_t id = 0; id < count; ++id)
    if (seen[id / 32] >> id % 32 & 1) logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
}

}  // namespace

void lm_head_scores(float* out, float* maxima, const LmHead& head, const Sampling& sampling) {
  require_head(head);
  const std::int64_t tiles = (head.ids + kLmHeadTile - 1) / kLmHeadTile;
  for (std::int64_t first = 0; first < head.count; first += kMaxTokens) {
    const LogitBlocks blocks(head, first, std::min(kMaxTokens, head.count - first));
    blocks.for_each([&](std::int64_t block, std::int64_t index, float* logits) {
      const std::int64_t token = first + index, begin = block * kBlockIds, ids = std::min(kBlockIds, head.ids - begin);
      if (sampling.seen)
        penalize(logits, ids, sampling.seen + token * ((head.ids + 31) / 32) + begin / 32, sampling.penalty);
      if (sampling.temperature != 1)
        for (std::int64_t i = 0; i < ids; ++i) logits[i] /= sampling.temperature;
      std::memcpy(out + token * head.ids + begin, logits, ids * sizeof(float));
      if (!maxima) return;
      for (std::int64_t id = 0; id < ids; id += kLmHeadTile)
        maxima[token * tiles + (begin + id) / kLmHeadTile] = logit_statistics(logits + id, kLmHeadTile).max;
    });
  }
}

}  // namespace arcmerge
