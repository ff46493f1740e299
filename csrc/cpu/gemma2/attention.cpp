// attention: a head of keys with a block of queries at a time, of all the heads of queries that share it.
//
// Columns are queries, so that the softmax needs no sums across lanes and keys are left operands as they lie in the
// cache; values want pairs of keys in a word and are packed, once for a block of queries. Blocks of keys begin at even
// distances from fixed positions, and what a query does not see has weight 0 there: its result has the same bits in
// any company.
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/gemma2/kv_cache.h"
#include "cpu/gemma2/softmax.h"
#include "cpu/matmul/gemm.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

// With heads of 256, queries, scores, weights, values and sums take 310 KB, and keys 64: L2.
constexpr std::int64_t kKeys = 128, kMostColumns = 2 * kColumns;

struct Heads {
  const char* query;
  char* out;
  std::int64_t count, group;  // in a row; that share a head of keys
  Cache cache;
  Sight sight;

  std::int64_t row_bytes() const { return cache.head_dim * item_size(cache.dtype); }
  std::int64_t words() const { return row_bytes() / 4; }
};

// Queries of a sequence: `count` rows from `row` on, the first at `position`.
struct Queries {
  std::int64_t sequence, row, count, position;
};

// The memory of a thread: all that belongs to one block of queries, and to one of keys.
class Memory {
 public:
  Memory(std::int64_t columns, const Heads& heads) : lines_(new Line[size(columns, heads) / kLanes]) {
    const std::int64_t dim = heads.cache.head_dim;
    float* next = lines_[0].lane;
    const auto take = [&](std::int64_t count) { return std::exchange(next, next + count); };
    queries = reinterpret_cast<std::uint32_t*>(take(heads.words() * columns));
    positions = reinterpret_cast<std::int32_t*>(take(columns));
    scores = take(kKeys * columns);
    weights = reinterpret_cast<std::uint32_t*>(take(kKeys * columns));
    values = reinterpret_cast<std::uint32_t*>(take(kKeys * heads.words()));
    out = take(dim * columns);
    so_far = {take(columns), take(columns), take(columns)};
  }

  std::uint32_t *queries, *weights, *values;
  std::int32_t* positions;
  float *scores, *out;
  Columns so_far;

 private:
  struct alignas(64) Line {
    float lane[kLanes];
  };

  static std::int64_t size(std::int64_t columns, const Heads& heads) {
    return columns * (heads.words() + heads.cache.head_dim + 2 * kKeys + 4) + kKeys * heads.words();
  }

  std::unique_ptr<Line[]> lines_;
};

// Caches promise no alignment.
typedef std::uint16_t Bits16 __attribute__((aligned(1), may_alias));

// Values as words of the left operand, those of two keys of bf16 in a word.
template <class>
ARCMERGE_INLINE void pack_values_body(std::uint32_t* out, const char* value, std::int64_t keys, std::int64_t dim,
                                      DType dtype) {
  if (dtype == DType::f32) {
    std::memcpy(out, value, keys * dim * 4);
    return;
  }
  const Bits16* even = reinterpret_cast<const Bits16*>(value);
  for (; keys >= 2; keys -= 2, out += dim, even += 2 * dim)
    for (std::int64_t d = 0; d < dim; ++d) out[d] = even[d] | std::uint32_t(even[dim + d]) << 16;
  if (keys == 1)
    for (std::int64_t d = 0; d < dim; ++d) out[d] = even[d];
}

ARCMERGE_VARIANTS(void, pack_values,
                  (std::uint32_t* out, const char* value, std::int64_t keys, std::int64_t dim, DType dtype),
                  (out, value, keys, dim, dtype))

// Column g * count + i is query i of head g of the group; what is left over asks what the first asks.
void begin(const Memory& memory, std::int64_t columns, const Queries& queries, std::int64_t head, const Heads& heads) {
  std::fill_n(memory.queries, heads.words() * columns, 0u);
  std::fill_n(memory.positions, columns, std::int32_t(queries.position));
  std::fill_n(memory.out, heads.cache.head_dim * columns, 0.0f);
  std::fill_n(memory.so_far.greatest, columns, kNone);
  std::fill_n(memory.so_far.sums, columns, 0.0f);
  for (std::int64_t g = 0; g < heads.group; ++g) {
    const std::int64_t column = g * queries.count;
    const std::int64_t first = queries.row * heads.count + head * heads.group + g;
    transpose(memory.queries + column, columns, heads.query + first * heads.row_bytes(),
              heads.count * heads.row_bytes(), queries.count, heads.words());
    for (std::int64_t i = 0; i < queries.count; ++i) memory.positions[column + i] = std::int32_t(queries.position + i);
  }
}

// Keys [first, first + keys), which lie in one piece; no query sees the first if `unseen`, and it may be NaN.
void add_keys(const Memory& memory, std::int64_t columns, std::int64_t first, std::int64_t keys, bool unseen,
              std::int64_t sequence, std::int64_t head, const Heads& heads) {
  const Cache& cache = heads.cache;
  const std::int64_t bytes = heads.row_bytes(), dim = cache.head_dim;
  const std::int64_t offset = cache.offset(sequence, head, first);
  products(memory.scores, {cache.key + offset, bytes, 4}, keys, heads.words(), memory.queries, columns, nullptr,
           cache.dtype);
  softmax_block(memory.weights, memory.scores, keys, columns, first, memory.positions, heads.sight, memory.so_far,
                cache.dtype);
  pack_values(memory.values, cache.value + offset, keys, dim, cache.dtype);
  const bool pairs = cache.dtype == DType::bf16;
  if (unseen)
    for (std::int64_t d = 0; d < dim; ++d) memory.values[d] &= pairs ? 0xffff0000u : 0u;
  products(memory.out, {reinterpret_cast<const char*>(memory.values), 4, dim * 4}, dim, pairs ? (keys + 1) / 2 : keys,
           memory.weights, columns, memory.so_far.factors, cache.dtype);
}

void finish(const Memory& memory, std::int64_t columns, const Queries& queries, std::int64_t head, const Heads& heads) {
  const std::int64_t dim = heads.cache.head_dim;
  std::vector<float> rows(queries.count * dim);
  for (std::int64_t g = 0; g < heads.group; ++g) {
    const std::int64_t column = g * queries.count;
    transpose(reinterpret_cast<std::uint32_t*>(rows.data()), dim, memory.out + column, columns * 4, dim, queries.count);
    for (std::int64_t i = 0; i < queries.count; ++i) {
      float* row = rows.data() + i * dim;
      const float share = 1 / memory.so_far.sums[column + i];
      for (std::int64_t d = 0; d < dim; ++d) row[d] *= share;
      const std::int64_t to = (queries.row + i) * heads.count + head * heads.group + g;
      narrow(row, dim, heads.cache.dtype, heads.out + to * heads.row_bytes());
    }
  }
}

void attend(const Memory& memory, const Queries& queries, std::int64_t head, const Heads& heads) {
  const std::int64_t columns = (heads.group * queries.count + kLanes - 1) / kLanes * kLanes;
  const std::int64_t slots = heads.cache.slots, end = queries.position + queries.count;
  const std::int64_t seen = std::max<std::int64_t>(0, queries.position - std::int64_t(heads.sight.reach) + 1);
  begin(memory, columns, queries, head, heads);
  std::int64_t first = std::max(seen / kKeys * kKeys, seen / slots * slots);
  while (first < end) {
    const std::int64_t next = std::min((first / kKeys + 1) * kKeys, (first / slots + 1) * slots);
    const std::int64_t from = first + std::max<std::int64_t>(0, seen - first) / 2 * 2;
    add_keys(memory, columns, from, std::min(next, end) - from, from < seen, queries.sequence, head, heads);
    first = next;
  }
  finish(memory, columns, queries, head, heads);
}

}  // namespace

void attention(void* out, const void* query, std::int64_t heads, const Cache& cache, const std::int32_t* query_start,
               const std::int32_t* lengths, double scale, double softcap, std::int64_t window) {
  require_cache(cache, heads);
  const std::int64_t group = heads / cache.heads, most = std::max<std::int64_t>(1, kMostColumns / group);
  const Heads all{static_cast<const char*>(query), static_cast<char*>(out), heads, group, cache,
                  sight(scale, softcap, window)};
  std::vector<Queries> blocks;
  for (std::int64_t sequence = 0; sequence < cache.sequences; ++sequence)
    for (std::int64_t end = query_start[sequence + 1], row = query_start[sequence]; row < end; row += most)
      blocks.push_back({sequence, row, std::min(most, end - row), lengths[sequence] - end + row});
  // Those that see the most come first, so that the threads stop together.
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const Queries& a, const Queries& b) { return a.position > b.position; });
  parallel(std::int64_t(blocks.size()) * cache.heads, 1, [&](std::int64_t first, std::int64_t last) {
    const Memory memory((group * most + kLanes - 1) / kLanes * kLanes, all);
    for (std::int64_t i = first; i < last; ++i) attend(memory, blocks[i / cache.heads], i % cache.heads, all);
  });
}

}  // namespace arcmerge
