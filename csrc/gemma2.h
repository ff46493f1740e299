// The native operations that run a Gemma-2. They take raw addresses and 64-bit counts, and use neither Python nor
// torch. The documentation of python/arcmerge/ops defines their formulas and roundings.
//
// Every operation uses the threads of one pool, and its results do not depend on their number. Tensors are row-major
// bf16 or f32 with contiguous rows. Addresses need no alignment, and outputs must not overlap inputs. An operation that
// gets wrong arguments throws std::invalid_argument before it touches memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "merge.h"

namespace arcmerge {

// The maximum number of threads: more than any machine needs, and few enough to start.
constexpr int kMaxThreads = 1024;

// The number of threads in use, including the calling thread; by default default_threads().
int threads();
void set_threads(int threads);

// The number of processors that the process may run on, limited by OMP_NUM_THREADS and by the CPU quota of its control
// group, rounded up.
int default_threads();
// The number of threads that the CPU quota allows, kMaxThreads without a quota. root: a prefix for the paths of the
// files that it reads, empty except in tests.
int quota_threads(const std::string& root);

// Reads `count` bytes and drops them. Its speed is the memory bandwidth that other operations are compared with.
void read(const void* address, std::int64_t count);

// A weight with `rows` rows, each as long as the rows of x.
struct Matrix {
  const char* address = nullptr;
  std::int64_t rows = 0;
};

// out[t] = the products of x[t] with every row of every weight, concatenated. x: [count, length]; all have one dtype.
// Products are summed in f32 and rounded once. The bits of an output row depend on the other rows only in whether there
// are more than 16 of them. They may differ between variants in the last bits (gemv.cpp, packed_rows.cpp).
void linear(void* out, const void* x, std::int64_t count, std::int64_t length, const std::vector<Matrix>& weights,
            DType dtype);

// out: [count, rows] = gelu(x gate^T) * (x up^T), with the sums of `linear`, rounded once.
void linear_geglu(void* out, const void* x, std::int64_t count, std::int64_t length, const void* gate, const void* up,
                  std::int64_t rows, DType dtype);

// out: [rows, columns] = gelu(gate) * up. stepwise: round the gelu to dtype before the product. gate_stride, up_stride:
// the number of elements from one row to the next.
void geglu(void* out, const void* gate, std::int64_t gate_stride, const void* up, std::int64_t up_stride,
           std::int64_t rows, std::int64_t columns, DType dtype, bool stepwise);

// out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * (1 + weight). out and weight have dtype `dtype`.
void rmsnorm(void* out, const void* x, DType x_dtype, const void* weight, DType dtype, std::int64_t rows,
             std::int64_t columns, double eps);

// total = residual + rmsnorm(branch, post_weight); normed = rmsnorm(total, pre_weight). total and residual have dtype
// `residual_dtype`, to which all values between the norms are rounded; all other tensors have dtype `dtype`.
void rmsnorm_add_rmsnorm(void* total, void* normed, const void* branch, const void* residual, DType residual_dtype,
                         const void* post_weight, const void* pre_weight, DType dtype, std::int64_t rows,
                         std::int64_t columns, double eps);

// ---- attention

// The keys and the values of `sequences` sequences, each [sequences, heads, slots, head_dim]. Position p of a sequence
// is in slot p % slots.
struct KvCache {
  char *key = nullptr, *value = nullptr;
  std::int64_t sequences = 0, heads = 0, slots = 0, head_dim = 0;
  DType dtype = DType::bf16;

  std::int64_t offset(std::int64_t sequence, std::int64_t head, std::int64_t position) const {
    return ((sequence * heads + head) * slots + position % slots) * head_dim * item_size(dtype);
  }
};

// Rows of heads, each of which starts `stride` bytes after the one before it.
struct Rows {
  const char* address = nullptr;
  std::int64_t stride = 0;

  const char* row(std::int64_t t) const { return address + t * stride; }
};

// Writes the rotated query, [count, heads, head_dim], to out, and the rotated key and the value to the cache.
// table: the cosines and sines, [positions, head_dim]; their dtype decides the rounding. A position below 0 is padding.
void rope_cache(void* out, const Rows& query, std::int64_t heads, const Rows& key, const Rows& value,
                std::int64_t count, const void* table, DType table_dtype, const std::int64_t* positions,
                const std::int64_t* sequences, const KvCache& cache);

// out = softmax(softcap * tanh(scale * query . key / softcap)) value for packed sequences.
//
// query, out: [tokens, heads, head_dim]. query_start: [sequences + 1], the first row of each sequence, and the end.
// lengths: [sequences], the length of each sequence including these tokens. softcap 0: no cap. window: the number of
// last positions that a query sees, 0 for all. A row depends neither on the other rows nor on their number.
void attention(void* out, const void* query, std::int64_t heads, const KvCache& cache, const std::int32_t* query_start,
               const std::int32_t* lengths, double scale, double softcap, std::int64_t window);

// rope_cache and attention for one new token of each sequence. qkv: [sequences, (heads + 2 cache.heads) * head_dim],
// queries, then keys, then values. lengths: [sequences], including the new token; 0 for an idle row, whose result is 0.
void attention_decode(void* out, const void* qkv, std::int64_t heads, const void* table, DType table_dtype,
                      const std::int32_t* lengths, const KvCache& cache, double scale, double softcap,
                      std::int64_t window);

// ---- lm_head

// The inputs of lm_head: logits[t][id] = softcap * tanh(x[t] . weight[id] / softcap) in f32, with x: [count, length]
// and weight: [ids, length]. softcap 0: no cap. The logits of a token depend on the other tokens only in whether there
// are more than 16 of them, and only in the last bits.
struct LmHead {
  const char *x = nullptr, *weight = nullptr;
  std::int64_t count = 0, ids = 0, length = 0;
  DType dtype = DType::bf16;
  float softcap = 0;
};

// best[t] = the id of the largest logit, the lowest id of equal ones. Unless `ids` is null, also out[t] = the logarithm
// of the softmax of the logits at ids[t].
void lm_head_logprob(float* out, std::int64_t* best, const LmHead& head, const std::int64_t* ids);

// The changes to logits before an id is sampled. If bit i of word j of `seen`, [count, (ids + 31) / 32], is set, the
// logit of id 32 j + i is divided by the penalty if it is positive, else multiplied. Then all logits are divided by the
// temperature.
struct Sampling {
  const std::uint32_t* seen = nullptr;  // null: no penalty
  float penalty = 1, temperature = 1;
};

// The number of ids of a tile of lm_head_scores.
constexpr std::int64_t kLmHeadTile = 128;

// out: [count, ids], the changed logits. maxima, unless null: [count, tiles], the largest score of each tile.
void lm_head_scores(float* out, float* maxima, const LmHead& head, const Sampling& sampling);

// out[t] = the id with the largest score + noise. scores: [count, ids]. The noise is that of
// python/arcmerge/ops/gumbel.py for `seed` and steps[t].
void lm_head_draw(std::int64_t* out, const float* scores, std::int64_t count, std::int64_t ids, std::uint64_t seed,
                  const std::int64_t* steps);

}  // namespace arcmerge
