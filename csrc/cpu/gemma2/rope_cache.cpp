// rope_cache: rotates queries and keys, and stores keys and values, one row of projections at a time.
#include "cpu/gemma2/rope_cache.h"

#include <cstring>

#include "cpu/simd/convert.h"
#include "cpu/simd/variant.h"
#include "cpu/system/thread_pool.h"
#include "gemma2.h"

namespace arcmerge {
namespace {

template <DType dtype>
ARCMERGE_INLINE float get(const char* address, std::int64_t i) {
  if constexpr (dtype == DType::f32) {
    float value;
    std::memcpy(&value, address + 4 * i, 4);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, address + 2 * i, 2);
  return from_bf16(bits);
}

template <DType dtype>
ARCMERGE_INLINE void put(char* address, std::int64_t i, float value) {
  if constexpr (dtype == DType::f32) {
    std::memcpy(address + 4 * i, &value, 4);
  } else {
    const std::uint16_t bits = to_bf16(value);
    std::memcpy(address + 2 * i, &bits, 2);
  }
}

template <DType dtype>
ARCMERGE_INLINE float rounded(float value) {
  return dtype == DType::bf16 ? from_bf16(to_bf16(value)) : value;
}

template <DType dtype, DType table_dtype>
ARCMERGE_INLINE void rotate_head(char* out, const char* x, const char* table, std::int64_t half) {
  for (std::int64_t i = 0; i < half; ++i) {
    const float first = get<dtype>(x, i), second = get<dtype>(x, half + i);
    const float cosine = get<table_dtype>(table, i), sine = get<table_dtype>(table, half + i);
    put<dtype>(out, i, rounded<table_dtype>(first * cosine) - rounded<table_dtype>(second * sine));
    put<dtype>(out, half + i, rounded<table_dtype>(second * cosine) + rounded<table_dtype>(first * sine));
  }
}

template <class>
ARCMERGE_INLINE void rotate_body(void* out_head, const void* x_head, DType dtype, const void* angles, DType table_dtype,
                                 std::int64_t dim) {
  char* out = static_cast<char*>(out_head);
  const char *x = static_cast<const char*>(x_head), *table = static_cast<const char*>(angles);
  if (dtype == DType::f32)
    rotate_head<DType::f32, DType::f32>(out, x, table, dim / 2);
  else if (table_dtype == DType::f32)
    rotate_head<DType::bf16, DType::f32>(out, x, table, dim / 2);
  else
    rotate_head<DType::bf16, DType::bf16>(out, x, table, dim / 2);
}

}  // namespace

ARCMERGE_VARIANTS(void, rotate,
                  (void* out, const void* x, DType dtype, const void* table, DType table_dtype, std::int64_t dim),
                  (out, x, dtype, table, table_dtype, dim))

void rope_cache(void* out, const Rows& query, std::int64_t heads, const Rows& key, const Rows& value,
                std::int64_t count, const void* table, DType table_dtype, const std::int64_t* positions,
                const std::int64_t* sequences, const KvCache& cache) {
  require_cache(cache, heads);
  const std::int64_t head_bytes = cache.head_dim * item_size(cache.dtype);
  parallel(count, 4, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t t = first; t < last; ++t) {
      char* rotated = static_cast<char*>(out) + t * heads * head_bytes;
      if (positions[t] < 0) {
        std::memset(rotated, 0, heads * head_bytes);
        continue;
      }
      const char* angles = static_cast<const char*>(table) + positions[t] * cache.head_dim * item_size(table_dtype);
      for (std::int64_t head = 0; head < heads; ++head)
        rotate(rotated + head * head_bytes, query.row(t) + head * head_bytes, cache.dtype, angles, table_dtype,
               cache.head_dim);
      for (std::int64_t head = 0; head < cache.heads; ++head) {
        const std::int64_t offset = cache.offset(sequences[t], head, positions[t]);
        rotate(cache.key + offset, key.row(t) + head * head_bytes, cache.dtype, angles, table_dtype, cache.head_dim);
        std::memcpy(cache.value + offset, value.row(t) + head * head_bytes, head_bytes);
      }
    }
  });
}

}  // namespace arcmerge
