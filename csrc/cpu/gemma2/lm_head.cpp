// The head: the weight once, in blocks of ids of a fixed size, of which each token keeps three numbers.
//
// Few tokens go row by row at the speed of memory (gemv.cpp), many as columns at that of arithmetic (gemm.cpp); the
// last bits of a sum depend on which of the two it is.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/gemma2/logits.h"
#include "cpu/matmul/gemm.h"
#include "cpu/matmul/gemv.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

// Ids of a block: with 48 tokens 98 KB of logits, twice. And rows of the weight that dot_rows takes at once.
constexpr std::int64_t kIds = 512, kRows = 32;
static_assert(kIds % kHeadTile == 0, "a tile lies in one block");
// Tokens that dot_rows takes, and tokens whose numbers are kept at a time: 6 MB.
constexpr std::int64_t kFew = 16, kMost = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void require_head(const Head& head) {
  if (head.count < 0 || head.length < 0 || head.ids < 1)
    throw std::invalid_argument("a head must have tokens, columns and ids, got " + std::to_string(head.count) + ", " +
                                std::to_string(head.length) + " and " + std::to_string(head.ids));
}

// Logits of some tokens and of a block of ids at a time: [count][kIds], -inf past the last id.
class Blocks {
 public:
  // Tokens [first, first + count) of the head.
  Blocks(const Head& head, std::int64_t first, std::int64_t count)
      : head_(head), count_(count), bytes_(head.length * item_size(head.dtype)), x_(head.x + first * bytes_) {
    if (head.count <= kFew || bytes_ % 4 != 0) return;
    packed_.resize(columns(count) * words());
    parallel(count, kColumns, [&](std::int64_t token, std::int64_t last) {
      for (; token < last; token += kColumns) {
        const std::int64_t some = std::min(kColumns, last - token);
        transpose(packed_.data() + token * words(), columns(some), x_ + token * bytes_, bytes_, some, words());
      }
    });
  }

  std::int64_t number() const { return (head_.ids + kIds - 1) / kIds; }

  // Calls body(block, token, logits) for every block and token, in any order.
  template <class Body>
  void for_each(const Body& body) const {
    const std::int64_t group = packed_.empty() ? kFew : kColumns;
    parallel(number(), 1, [&](std::int64_t block, std::int64_t last) {
      std::vector<float> logits(group * kIds), sums(group * kIds);
      for (; block < last; ++block)
        for (std::int64_t token = 0; token < count_; token += group) {
          const std::int64_t count = std::min(group, count_ - token), ids = std::min(kIds, head_.ids - block * kIds);
          if (packed_.empty())
            row_by_row(logits.data(), sums.data(), block, token, count, ids);
          else
            by_columns(logits.data(), sums.data(), block, token, count, ids);
          for (std::int64_t t = 0; t < count; ++t) {
            float* row = logits.data() + t * kIds;
            if (head_.softcap) cap_logits(row, kIds, head_.softcap);
            std::fill(row + ids, row + kIds, -kInfinity);
            body(block, token + t, row);
          }
        }
    });
  }

 private:
  std::int64_t words() const { return bytes_ / 4; }
  static std::int64_t columns(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

  void row_by_row(float* logits, float* sums, std::int64_t block, std::int64_t token, std::int64_t count,
                  std::int64_t ids) const {
    for (std::int64_t id = 0; id < ids; id += kRows) {
      const std::int64_t rows = std::min(kRows, ids - id);
      dot_rows(head_.weight + (block * kIds + id) * bytes_, rows, x_ + token * bytes_, count, head_.length, head_.dtype,
               sums);
      for (std::int64_t t = 0; t < count; ++t)
        for (std::int64_t row = 0; row < rows; ++row) logits[t * kIds + id + row] = sums[row * count + t];
    }
  }

  void by_columns(float* logits, float* sums, std::int64_t block, std::int64_t token, std::int64_t count,
                  std::int64_t ids) const {
    products(sums, {head_.weight + block * kIds * bytes_, bytes_, 4}, ids, words(), packed_.data() + token * words(),
             columns(count), nullptr, head_.dtype);
    transpose(reinterpret_cast<std::uint32_t*>(logits), kIds, sums, columns(count) * 4, ids, count);
  }

  const Head& head_;
  std::int64_t count_, bytes_;
  const char* x_;
  std::vector<std::uint32_t> packed_;  // [group of kColumns tokens][word][token], empty for few tokens
};

struct Partial {
  Extremes extremes;
  std::int64_t best;
};

// The lowest id of the greatest logit; the first if none is a number above -inf.
std::int64_t best_of(const float* logits, float greatest) {
  return greatest == -kInfinity ? 0 : std::find(logits, logits + kIds, greatest) - logits;
}

// Blocks in the order of their ids, the first at partials[0], the next `stride` further on.
Partial all_blocks(const Partial* partials, std::int64_t stride, std::int64_t number) {
  Partial all = partials[0];
  for (std::int64_t block = 1; block < number; ++block)
    if (partials[block * stride].extremes.greatest > all.extremes.greatest) all = partials[block * stride];
  all.extremes.sum = 0;
  for (std::int64_t block = 0; block < number; ++block) {
    const Extremes& one = partials[block * stride].extremes;
    all.extremes.sum += one.sum * std::exp(one.greatest - all.extremes.greatest);
  }
  return all;
}

}  // namespace

void lm_head_logprob(float* out, std::int64_t* best, const Head& head, const std::int64_t* ids) {
  require_head(head);
  for (std::int64_t first = 0; first < head.count; first += kMost) {
    const std::int64_t count = std::min(kMost, head.count - first);
    const Blocks blocks(head, first, count);
    std::vector<Partial> partials(blocks.number() * count);
    std::vector<float> chosen(count);
    blocks.for_each([&](std::int64_t block, std::int64_t token, const float* logits) {
      const Extremes found = extremes(logits, kIds);
      partials[block * count + token] = {found, block * kIds + best_of(logits, found.greatest)};
      if (ids && ids[first + token] / kIds == block) chosen[token] = logits[ids[first + token] % kIds];
    });
    for (std::int64_t token = 0; token < count; ++token) {
      const Partial all = all_blocks(partials.data() + token, count, blocks.number());
      best[first + token] = all.best;
      if (ids)
        out[first + token] = float(double(chosen[token]) - all.extremes.greatest - std::log(double(all.extremes.sum)));
    }
  }
}

namespace {

void penalise(float* logits, std::int64_t count, const std::uint32_t* seen, float penalty) {
  for (std::int64_t id = 0; id < count; ++id)
    if (seen[id / 32] >> id % 32 & 1) logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
}

}  // namespace

void head_scores(float* out, float* maxima, const Head& head, const Sampling& how) {
  require_head(head);
  const std::int64_t tiles = (head.ids + kHeadTile - 1) / kHeadTile;
  for (std::int64_t first = 0; first < head.count; first += kMost) {
    const Blocks blocks(head, first, std::min(kMost, head.count - first));
    blocks.for_each([&](std::int64_t block, std::int64_t number, float* logits) {
      const std::int64_t token = first + number, begin = block * kIds, ids = std::min(kIds, head.ids - begin);
      if (how.seen) penalise(logits, ids, how.seen + token * ((head.ids + 31) / 32) + begin / 32, how.penalty);
      if (how.temperature != 1)
        for (std::int64_t i = 0; i < ids; ++i) logits[i] /= how.temperature;
      std::memcpy(out + token * head.ids + begin, logits, ids * sizeof(float));
      if (!maxima) return;
      for (std::int64_t id = 0; id < ids; id += kHeadTile)
        maxima[token * tiles + (begin + id) / kHeadTile] = extremes(logits + id, kHeadTile).greatest;
    });
  }
}

}  // namespace arcmerge
