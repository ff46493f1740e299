// The native operations that run a Gemma-2, beside those that merge (merge.h): raw addresses and 64-bit counts in,
// numbers out. No Python, no torch. python/arcmerge/ops says what each computes and where it rounds.
//
// Every operation spreads over the threads of one pool, and its results do not depend on their number. Tensors are
// row-major bf16 or f32, rows contiguous; addresses need no alignment; outputs must not overlap inputs.
// All of them throw std::invalid_argument, with a sentence, before they touch memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "merge.h"

namespace arcmerge {

// More threads than any machine has use for, and few enough to start.
constexpr int kMaxThreads = 1024;

// How many threads work, the calling one among them: at first default_threads().
int threads();
void set_threads(int threads);

// One for each processor that the process may run on, but no more than OMP_NUM_THREADS and the quota of its control
// group, rounded up, allow.
int default_threads();
// What the quota allows, 1024 where there is none, by the files below `root`, which is empty but in tests.
int quota_threads(const std::string& root);

// Reads `count` bytes and does nothing with them: how fast that goes is what other operations are compared with.
void read(const void* address, std::int64_t count);

// A weight of `rows` rows, as long as those of x.
struct Matrix {
  const char* address = nullptr;
  std::int64_t rows = 0;
};

// out[t] = x[t] times every row of every weight, side by side; x: [count, length], all of one dtype. Sums in f32 and
// one rounding. The bits of a row depend on the others only in whether there are more than 16. Of all operations only
// these sums may differ between variants, in their last bits (gemv.cpp, packed_rows.cpp).
void linear(void* out, const void* x, std::int64_t count, std::int64_t length, const std::vector<Matrix>& weights,
            DType dtype);

// out: [count, rows] = gelu(x times gate) * (x times up), with the sums of `linear`, rounded once.
void linear_geglu(void* out, const void* x, std::int64_t count, std::int64_t length, const void* gate, const void* up,
                  std::int64_t rows, DType dtype);

// out: [rows, columns] = gelu(gate) * up; stepwise: the gelu is rounded to dtype on the way. The rows of gate and up
// begin gate_stride and up_stride elements from one another.
void geglu(void* out, const void* gate, std::int64_t gate_stride, const void* up, std::int64_t up_stride,
           std::int64_t rows, std::int64_t columns, DType dtype, bool stepwise);

// out[row] = x[row] / sqrt(mean of x[row]^2 + eps) * (1 + weight). out and weight have one dtype.
void rmsnorm(void* out, const void* x, DType x_dtype, const void* weight, DType dtype, std::int64_t rows,
             std::int64_t columns, double eps);

// total = residual + rmsnorm(branch, post_weight); normed = rmsnorm(total, pre_weight). total and residual have one
// dtype, to which all between the norms is rounded; everything else has the other.
void rmsnorm_add_rmsnorm(void* total, void* normed, const void* branch, const void* residual, DType residual_dtype,
                         const void* post_weight, const void* pre_weight, DType dtype, std::int64_t rows,
                         std::int64_t columns, double eps);

// ---- attention

// Keys and values of `sequences` sequences, each [sequences, heads, slots, head_dim] of dtype; position p of a sequence
// lies in slot p % slots.
struct Cache {
  char *key = nullptr, *value = nullptr;
  std::int64_t sequences = 0, heads = 0, slots = 0, head_dim = 0;
  DType dtype = DType::bf16;

  std::int64_t offset(std::int64_t sequence, std::int64_t head, std::int64_t position) const {
    return ((sequence * heads + head) * slots + position % slots) * head_dim * item_size(dtype);
  }
};

// Rows of heads that begin `stride` bytes from one another.
struct Rows {
  const char* address = nullptr;
  std::int64_t stride = 0;

  const char* row(std::int64_t t) const { return address + t * stride; }
};

// The rotated query, [count, heads, head_dim] -> out, and the rotated key and the value -> the cache. table_dtype: of
// a table [positions, head_dim]; it decides the rounding. positions below 0 are padding.
void rope_cache(void* out, const Rows& query, std::int64_t heads, const Rows& key, const Rows& value,
                std::int64_t count, const void* table, DType table_dtype, const std::int64_t* positions,
                const std::int64_t* sequences, const Cache& cache);

// softmax(softcap * tanh(scale * query . key / softcap)) value for packed sequences; query, out: [tokens, heads,
// head_dim]. query_start: where each sequence's rows begin, and an end. lengths: of the sequences, with these tokens.
// softcap 0: none; window 0: all keys up to the query. A row depends neither on the others nor on their number.
void attention(void* out, const void* query, std::int64_t heads, const Cache& cache, const std::int32_t* query_start,
               const std::int32_t* lengths, double scale, double softcap, std::int64_t window);

// The same for one new token of each sequence, [sequences, (heads + 2 cache.heads) * head_dim] of queries, keys and
// values, after rope_cache. lengths: with the new token; 0 for an idle row, whose result is 0.
void attention_decode(void* out, const void* qkv, std::int64_t heads, const void* table, DType table_dtype,
                      const std::int32_t* lengths, const Cache& cache, double scale, double softcap,
                      std::int64_t window);

// ---- the head

// logits[t][id] = softcap * tanh(x[t] . weight[id] / softcap) in f32, of x: [count, length] and weight: [ids, length].
// softcap 0: none. The bits of a token's logits depend on the others only in
// whether there are more than 16, and in the last places.
struct Head {
  const char *x = nullptr, *weight = nullptr;
  std::int64_t count = 0, ids = 0, length = 0;
  DType dtype = DType::bf16;
  float softcap = 0;
};

// best[t]: the id of the greatest logit, the lowest of equals. With `ids`, also out[t] = the logarithm of the softmax
// of the logits at ids[t].
void lm_head_logprob(float* out, std::int64_t* best, const Head& head, const std::int64_t* ids);

// What becomes of logits before one is drawn: if bit i of word j of `seen`, [count, (ids + 31) / 32], is set, that of
// id 32 j + i is divided by the penalty if above 0, else multiplied; then all are divided by the temperature.
struct Sampling {
  const std::uint32_t* seen = nullptr;  // or none
  float penalty = 1, temperature = 1;
};

// out: [count, ids]. maxima, if not null: [count, tiles], the greatest score of every kHeadTile ids.
constexpr std::int64_t kHeadTile = 128;
void head_scores(float* out, float* maxima, const Head& head, const Sampling& how);

// out[t]: the id of the greatest score + noise, of scores [count, ids]; the noise of python/arcmerge/ops/gumbel.py.
void head_draw(std::int64_t* out, const float* scores, std::int64_t count, std::int64_t ids, std::uint64_t seed,
               const std::int64_t* steps);

}  // namespace arcmerge
