// attention: multiplies one head of keys with a block of queries, from all query heads that share it.
//
// Queries are the columns of the matrix products, so that the softmax needs no sums across lanes, and keys can be the
// left operand as the cache has them. Values need two keys in a word and are packed once for a block of queries. Blocks
// of keys start at fixed positions, or at even distances from them, and keys that a query does not see have weight 0.
// So the result of a query does not depend on the other queries.
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/gemma2/rope_cache.h"
#include "cpu/gemma2/softmax.h"
#include "cpu/matmul/gemm.h"
#include "cpu/matmul/transpose.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

// With a head_dim of 256, queries, scores, weights, values and sums take 310 KB and keys 64 KB, which fit in L2.
constexpr std::int64_t kBlockKeys = 128, kMaxColumns = 2 * kColumns;

// The arguments of a call.
struct Call {
  const char* query;
  char* out;
  std::int64_t heads, group;  // the query heads of a row, and those that share a head of keys
  KvCache cache;
  ScoreParameters scoring;

  std::int64_t row_bytes() const { return cache.head_dim * item_size(cache.dtype); }
  std::int64_t words() const { return row_bytes() / 4; }
};

// Queries of a sequence: `count` rows from row `row` on, the first of them at `position`.
struct QueryBlock {
  std::int64_t sequence, row, count, position;
};

// The memory of a thread, for one block of queries and one block of keys.
class Workspace {
 public:
  Workspace(std::int64_t columns, const Call& call) : lines_(new Line[size(columns, call) / kLanes]) {
    const std::int64_t dim = call.cache.head_dim;
    float* next = lines_[0].lane;
    const auto take = [&](std::int64_t count) { return std::exchange(next, next + count); };
    queries = reinterpret_cast<std::uint32_t*>(take(call.words() * columns));
    positions = reinterpret_cast<std::int32_t*>(take(columns));
    scores = take(kBlockKeys * columns);
    weights = reinterpret_cast<std::uint32_t*>(take(kBlockKeys * columns));
    values = reinterpret_cast<std::uint32_t*>(take(kBlockKeys * call.words()));
    out = take(dim * columns);
    running = {take(columns), take(columns), take(columns)};
  }

  std::uint32_t *queries, *weights, *values;
  std::int32_t* positions;
  float *scores, *out;
  RunningSoftmax running;

 private:
  struct alignas(64) Line {
    float lane[kLanes];
  };

  static std::int64_t size(std::int64_t columns, const Call& call) {
    return columns * (call.words() + call.cache.head_dim + 2 * kBlockKeys + 4) + kBlockKeys * call.words();
  }

  std::unique_ptr<Line[]> lines_;
};

// Elements of a cache, which may be unaligned.
typedef std::uint16_t Bits16 __attribute__((aligned(1), may_alias));

// Packs values as words of a left operand, with two keys in a word for bf16.
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

// Loads the queries of one head of keys as the columns of the right operand, [word][column]. They come from all heads
// of the group, and columns without a query are zeros at the first position:
//
//     column   0 ... count - 1     count ... 2 count - 1   ...   group * count ...
//     query    of head 0           of head 1               ...   none
void load_queries(const Workspace& workspace, std::int64_t columns, const QueryBlock& queries, std::int64_t head,
                  const Call& call) {
  std::fill_n(workspace.queries, call.words() * columns, 0u);
  std::fill_n(workspace.positions, columns, std::int32_t(queries.position));
  std::fill_n(workspace.out, call.cache.head_dim * columns, 0.0f);
  std::fill_n(workspace.running.max, columns, kLowest);
  std::fill_n(workspace.running.sum, columns, 0.0f);
  for (std::int64_t g = 0; g < call.group; ++g) {
    const std::int64_t column = g * queries.count;
    const std::int64_t first = queries.row * call.heads + head * call.group + g;
    transpose(workspace.queries + column, columns, call.query + first * call.row_bytes(), call.heads * call.row_bytes(),
              queries.count, call.words());
    for (std::int64_t i = 0; i < queries.count; ++i)
      workspace.positions[column + i] = std::int32_t(queries.position + i);
  }
}

// Adds keys [first, first + keys), which are adjacent in the cache. If `unseen`, no query sees the first of them, whose
// value may be NaN.
void add_keys(const Workspace& workspace, std::int64_t columns, std::int64_t first, std::int64_t keys, bool unseen,
              std::int64_t sequence, std::int64_t head, const Call& call) {
  const KvCache& cache = call.cache;
  const std::int64_t bytes = call.row_bytes(), dim = cache.head_dim;
  const std::int64_t offset = cache.offset(sequence, head, first);
  gemm(workspace.scores, {cache.key + offset, bytes, 4}, keys, call.words(), workspace.queries, columns, nullptr,
       cache.dtype);
  softmax_block(workspace.weights, workspace.scores, keys, columns, first, workspace.positions, call.scoring,
                workspace.running, cache.dtype);
  pack_values(workspace.values, cache.value + offset, keys, dim, cache.dtype);
  const bool pairs = cache.dtype == DType::bf16;
  if (unseen)
    for (std::int64_t d = 0; d < dim; ++d) workspace.values[d] &= pairs ? 0xffff0000u : 0u;
  gemm(workspace.out, {reinterpret_cast<const char*>(workspace.values), 4, dim * 4}, dim, pairs ? (keys + 1) / 2 : keys,
       workspace.weights, columns, workspace.running.factor, cache.dtype);
}

void store_results(const Workspace& workspace, std::int64_t columns, const QueryBlock& queries, std::int64_t head,
                   const Call& call) {
  const std::int64_t dim = call.cache.head_dim;
  std::vector<float> rows(queries.count * dim);
  for (std::int64_t g = 0; g < call.group; ++g) {
    const std::int64_t column = g * queries.count;
    transpose(reinterpret_cast<std::uint32_t*>(rows.data()), dim, workspace.out + column, columns * 4, dim,
              queries.count);
    for (std::int64_t i = 0; i < queries.count; ++i) {
      float* row = rows.data() + i * dim;
      const float share = 1 / workspace.running.sum[column + i];
      for (std::int64_t d = 0; d < dim; ++d) row[d] *= share;
      const std::int64_t target = (queries.row + i) * call.heads + head * call.group + g;
      narrow(row, dim, call.cache.dtype, call.out + target * call.row_bytes());
    }
  }
}

void attend(const Workspace& workspace, const QueryBlock& queries, std::int64_t head, const Call& call) {
  const std::int64_t columns = (call.group * queries.count + kLanes - 1) / kLanes * kLanes;
  const std::int64_t slots = call.cache.slots, end = queries.position + queries.count;
  const std::int64_t first_seen = std::max<std::int64_t>(0, queries.position - std::int64_t(call.scoring.window) + 1);
  load_queries(workspace, columns, queries, head, call);
  std::int64_t first = std::max(first_seen / kBlockKeys * kBlockKeys, first_seen / slots * slots);
  while (first < end) {
    const std::int64_t next = std::min((first / kBlockKeys + 1) * kBlockKeys, (first / slots + 1) * slots);
    const std::int64_t start = first + std::max<std::int64_t>(0, first_seen - first) / 2 * 2;
    add_keys(workspace, columns, start, std::min(next, end) - start, start < first_seen, queries.sequence, head, call);
    first = next;
  }
  store_results(workspace, columns, queries, head, call);
}

}  // namespace

void attention(void* out, const void* query, std::int64_t heads, const KvCache& cache, const std::int32_t* query_start,
               const std::int32_t* lengths, double scale, double softcap, std::int64_t window) {
  require_cache(cache, heads);
  const std::int64_t group = heads / cache.heads, block_queries = std::max<std::int64_t>(1, kMaxColumns / group);
  const Call call{static_cast<const char*>(query),         static_cast<char*>(out), heads, group, cache,
                  score_parameters(scale, softcap, window)};
  std::vector<QueryBlock> blocks;
  for (std::int64_t sequence = 0; sequence < cache.sequences; ++sequence)
    for (std::int64_t end = query_start[sequence + 1], row = query_start[sequence]; row < end; row += block_queries)
      blocks.push_back({sequence, row, std::min(block_queries, end - row), lengths[sequence] - end + row});
  // Blocks that see the most keys come first, so that the threads stop together.
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const QueryBlock& a, const QueryBlock& b) { return a.position > b.position; });
  parallel(std::int64_t(blocks.size()) * cache.heads, 1, [&](std::int64_t first, std::int64_t last) {
    const Workspace workspace((group * block_queries + kLanes - 1) / kLanes * kLanes, call);
    for (std::int64_t i = first; i < last; ++i) attend(workspace, blocks[i / cache.heads], i % cache.heads, call);
  });
}

}  // namespace arcmerge
