// The operations of gemma2.h with a cache, whose elements are NaN except those that an operation may read. All
// sequences together and each alone, with one thread and with several, must give the same bits, close to plain loops in
// f64.
#include <set>
#include <utility>

#include "native.h"

namespace fuzz {
namespace {

using arcmerge::item_size;
using arcmerge::KvCache;

// Two caches whose elements are NaN until they are set.
struct Caches {
  Count sequences, heads, slots, dim;
  DType dtype;
  Memory key, value;

  Caches(Count sequences, Count heads, Count slots, Count dim, DType dtype, Count shift)
      : sequences(sequences),
        heads(heads),
        slots(slots),
        dim(dim),
        dtype(dtype),
        key(sequences * heads * slots * dim * item_size(dtype), shift, 0xff),
        value(key.bytes, shift, 0xff) {}
  Caches(const Caches& other)
      : sequences(other.sequences),
        heads(other.heads),
        slots(other.slots),
        dim(other.dim),
        dtype(other.dtype),
        key(other.key, 0),
        value(other.value, 0) {}

  Count element(Count sequence, Count head, Count position) const {
    return ((sequence * heads + head) * slots + position % slots) * dim;
  }
  KvCache all() const { return {key.address, value.address, sequences, heads, slots, dim, dtype}; }
  KvCache one(Count sequence) const {
    const Count skip = element(sequence, 0, 0) * item_size(dtype);
    return {key.address + skip, value.address + skip, 1, heads, slots, dim, dtype};
  }
  // Numbers at the positions [first, end) of a sequence.
  void write(Input& in, Count sequence, Count first, Count end) {
    for (Count head = 0; head < heads; ++head)
      for (const Memory* memory : {&key, &value}) {
        const Memory numbers = tensor(in, std::max<Count>(0, end - first) * dim, dtype, false);
        const Count bytes = dim * item_size(dtype);
        for (Count p = first; p < end; ++p)
          std::memcpy(memory->address + element(sequence, head, p) * item_size(dtype),
                      numbers.address + (p - first) * bytes, bytes);
      }
  }
};

struct Scores {
  double scale, softcap;
  Count window;

  explicit Scores(Input& in)
      : scale(double(in.byte()) / 64),
        softcap(in.flag() ? 0 : 0.5 + in.below(100)),
        window(in.flag()       ? 0
               : in.byte() % 8 ? 1 + in.count(600)
                               : (Count(1) << (20 + in.below(30))) + in.below(3)) {}

  Count first(Count position) const { return window ? std::max<Count>(0, position - window + 1) : 0; }
};

// Requires row `row` of `out` to be close to the softmax of the scores of row `row` of `query`, times the values.
void require_attention(const char* out, const char* query, Count row, Count heads, Count sequence, Count position,
                       const Caches& caches, const Scores& how, const char* what) {
  const Count dim = caches.dim, first = how.first(position), keys = position + 1 - first;
  for (Count head = 0; head < heads; ++head) {
    const Count of = head / (heads / caches.heads), at = (row * heads + head) * dim;
    std::vector<double> weights(keys), mixed(dim);
    double max = -INFINITY, sum = 0;
    for (Count key = 0; key < keys; ++key) {
      double product = 0;
      for (Count d = 0; d < dim; ++d)
        product += double(value_of(query, caches.dtype, at + d)) *
                   value_of(caches.key.address, caches.dtype, caches.element(sequence, of, first + key) + d);
      product *= how.scale;
      weights[key] = how.softcap ? how.softcap * std::tanh(product / how.softcap) : product;
      max = std::max(max, weights[key]);
    }
    for (Count key = 0; key < keys; ++key) {
      const double weight = std::exp(weights[key] - max);
      sum += weight;
      for (Count d = 0; d < dim; ++d)
        mixed[d] +=
            weight * value_of(caches.value.address, caches.dtype, caches.element(sequence, of, first + key) + d);
    }
    for (Count d = 0; d < dim; ++d)
      require(close(value_of(out, caches.dtype, at + d), mixed[d] / sum, caches.dtype == DType::bf16 ? 0.03 : 5e-3),
              what);
  }
}

struct Heads {
  Count of_keys, of_queries, dim;

  explicit Heads(Input& in)
      : of_keys(1 + in.below(3)), of_queries(of_keys * (in.byte() ? 1 + in.below(5) : 97)), dim(16 << in.below(5)) {}
};

void attention(Input& in) {
  const DType dtype = in.activation();
  const Heads heads(in);
  const Scores how(in);
  const Count sequences = in.below(4), item = item_size(dtype);
  std::vector<std::int32_t> starts = {0}, lengths;
  Count longest = 0, most = 0;
  const Count room = std::max<Count>(1, 600000 / (heads.of_queries * heads.dim * 300));
  for (Count i = 0; i < sequences; ++i) {
    const Count queries = std::min(room, in.count(130)), length = queries + in.count(700);
    starts.push_back(starts.back() + std::int32_t(queries));
    lengths.push_back(std::int32_t(length));
    longest = std::max(longest, length);
    most = std::max(most, queries);
  }
  Count slots = std::max<Count>(1, longest) + in.below(20);
  if (how.window && how.window + most - 1 < longest && in.flag())
    slots = std::max<Count>(64, (how.window + most - 1 + 63) / 64 * 64);
  Caches caches(sequences, heads.of_keys, slots, heads.dim, dtype, in.below(4));
  for (Count i = 0; i < sequences; ++i)
    if (starts[i + 1] > starts[i]) caches.write(in, i, how.first(lengths[i] - (starts[i + 1] - starts[i])), lengths[i]);
  const Count row = heads.of_queries * heads.dim * item, tokens = starts.back();
  const Memory query = tensor(in, tokens * row / item, dtype, false, in.below(4)), out(query.bytes, in.below(4));

  use_any_variant(in);
  use_threads(in, true);
  arcmerge::attention(out.address, query.address, heads.of_queries, caches.all(), starts.data(), lengths.data(),
                      how.scale, how.softcap, how.window);
  use_threads(in, false);
  for (Count i = 0; i < sequences; ++i) {
    const Count queries = starts[i + 1] - starts[i];
    for (Count t = queries > 8 ? in.below(8) : 0; t < queries; t += 1 + queries / 8)
      require_attention(out.address, query.address, starts[i] + t, heads.of_queries, i, lengths[i] - queries + t,
                        caches, how, "attention");
    const std::int32_t some = std::int32_t(queries ? 1 + in.below(queries) : 0), alone[] = {0, some};
    const Memory last(some * row, 0, 0x5a), asked(some * row);
    std::memcpy(asked.address, query.address + (starts[i + 1] - some) * row, asked.bytes);
    arcmerge::attention(last.address, asked.address, heads.of_queries, caches.one(i), alone, &lengths[i], how.scale,
                        how.softcap, how.window);
    require(std::memcmp(last.address, out.address + (starts[i + 1] - some) * row, last.bytes) == 0,
            "attention: bits of the last queries by themselves");
  }
}

DType table_dtype_of(Input& in, DType dtype) { return dtype == DType::f32 ? dtype : in.activation(); }

void attention_decode(Input& in) {
  const DType dtype = in.activation(), table_dtype = table_dtype_of(in, dtype);
  const Heads heads(in);
  const Scores how(in);
  const Count sequences = in.below(4), item = item_size(dtype), all = heads.of_queries + 2 * heads.of_keys;
  std::vector<std::int32_t> lengths, starts = {0};
  std::vector<Count> positions, numbers;
  Count longest = 0;
  for (Count i = 0; i < sequences; ++i) {
    lengths.push_back(std::int32_t(in.count(heads.dim > 64 ? 600 : 1100)));
    positions.push_back(lengths[i] - 1);
    numbers.push_back(i);
    longest = std::max<Count>(longest, lengths[i]);
  }
  Count slots = std::max<Count>(1, longest) + in.below(20);
  if (how.window && how.window < longest && in.flag()) slots = how.window + in.below(20);
  Caches caches(sequences, heads.of_keys, slots, heads.dim, dtype, in.below(4));
  for (Count i = 0; i < sequences; ++i)
    if (lengths[i]) caches.write(in, i, how.first(positions[i]), positions[i]);
  const Caches before(caches);
  const Count head_bytes = heads.dim * item, row = heads.of_queries * head_bytes;
  const Memory table = tensor(in, longest * heads.dim, table_dtype, false, in.below(4));
  const Memory qkv = tensor(in, sequences * all * heads.dim, dtype, false, in.below(4));
  const Memory out(sequences * row, in.below(4)), rotated(out.bytes);

  use_any_variant(in);
  use_threads(in, true);
  arcmerge::attention_decode(out.address, qkv.address, heads.of_queries, table.address, table_dtype, lengths.data(),
                             caches.all(), how.scale, how.softcap, how.window);
  use_threads(in, false);
  const Caches again(before), roped(before);
  const Count stride = all * head_bytes;
  arcmerge::rope_cache(rotated.address, {qkv.address, stride}, heads.of_queries, {qkv.address + row, stride},
                       {qkv.address + row + heads.of_keys * head_bytes, stride}, sequences, table.address, table_dtype,
                       positions.data(), numbers.data(), roped.all());
  require(roped.key == caches.key && roped.value == caches.value, "attention_decode: the cache");
  for (Count i = 0; i < sequences; ++i) {
    const Memory alone(row, 0, 0x5a);
    arcmerge::attention_decode(alone.address, qkv.address + i * stride, heads.of_queries, table.address, table_dtype,
                               &lengths[i], again.one(i), how.scale, how.softcap, how.window);
    require(std::memcmp(alone.address, out.address + i * row, row) == 0, "attention_decode of one sequence");
    if (lengths[i])
      require_attention(out.address, rotated.address, i, heads.of_queries, i, positions[i], caches, how,
                        "attention_decode");
    else
      require(std::all_of(alone.address, alone.address + row, [](char byte) { return byte == 0; }), "an idle row");
  }
}

// Rotates `heads` heads one by one.
void rotate(char* to, const char* from, Count heads, Count dim, DType dtype, const char* angles, DType table_dtype) {
  for (Count i = 0; i < heads * dim; ++i) {
    const Count pair = i % dim % (dim / 2), first = i / dim * dim + pair, second = first + dim / 2;
    const float cosine = value_of(angles, table_dtype, pair), sine = value_of(angles, table_dtype, dim / 2 + pair);
    const float a = value_of(from, dtype, first), b = value_of(from, dtype, second);
    const float sum = i == first ? rounded(a * cosine, table_dtype) - rounded(b * sine, table_dtype)
                                 : rounded(b * cosine, table_dtype) + rounded(a * sine, table_dtype);
    put_value(to, dtype, i, sum);
  }
}

void rope_cache(Input& in) {
  const DType dtype = in.activation(), table_dtype = table_dtype_of(in, dtype);
  const Count of_keys = 1 + in.below(3), of_queries = of_keys * (1 + in.below(5)), dim = 2 << in.below(8);
  const Count sequences = 1 + in.below(4), slots = 1 + in.count(200), rows = 1 + in.count(520), item = item_size(dtype);
  const Count count = in.count(std::max<Count>(1, 20000 / (of_queries * dim))), bytes = dim * item;
  std::vector<Count> positions, numbers;
  std::set<std::pair<Count, Count>> used;
  for (Count t = 0; t < count; ++t) {
    numbers.push_back(in.below(sequences));
    const Count position = Count(in.random() % std::uint64_t(rows));
    const bool writes = in.random() % 8 && used.insert({numbers[t], position % slots}).second;
    positions.push_back(writes ? position : -1 - in.below(200));
  }
  const Memory table = tensor(in, rows * dim, table_dtype, false, in.below(4));
  const auto states = [&](Count heads, Count stride) {
    return tensor(in, count ? (count - 1) * stride + heads * dim : 0, dtype, false, in.below(4));
  };
  Count strides[3];
  for (Count& stride : strides) stride = of_queries * dim + in.below(20);
  const Memory query = states(of_queries, strides[0]), key = states(of_keys, strides[1]);
  const Memory value = states(of_keys, strides[2]), out(count * of_queries * bytes, in.below(4)), expected(out.bytes);
  const Caches caches(sequences, of_keys, slots, dim, dtype, in.below(4)), wanted(caches);
  use_any_variant(in);
  use_threads(in, in.flag());
  arcmerge::rope_cache(out.address, {query.address, strides[0] * item}, of_queries, {key.address, strides[1] * item},
                       {value.address, strides[2] * item}, count, table.address, table_dtype, positions.data(),
                       numbers.data(), caches.all());
  for (Count t = 0; t < count; ++t) {
    char* rotated = expected.address + t * of_queries * bytes;
    std::memset(rotated, 0, of_queries * bytes);
    if (positions[t] < 0) continue;
    const char* angles = table.address + positions[t] * dim * item_size(table_dtype);
    rotate(rotated, query.address + t * strides[0] * item, of_queries, dim, dtype, angles, table_dtype);
    for (Count head = 0; head < of_keys; ++head) {
      const Count to = wanted.element(numbers[t], head, positions[t]) * item;
      rotate(wanted.key.address + to, key.address + t * strides[1] * item + head * bytes, 1, dim, dtype, angles,
             table_dtype);
      std::memcpy(wanted.value.address + to, value.address + t * strides[2] * item + head * bytes, bytes);
    }
  }
  require(out == expected, "rope_cache: the query");
  require(caches.key == wanted.key && caches.value == wanted.value, "rope_cache: the cache");
}

}  // namespace

void attention_operation(Input& in) {
  constexpr void (*kOperations[])(Input&) = {attention, attention_decode, rope_cache};
  kOperations[in.below(std::size(kOperations))](in);
}

}  // namespace fuzz
