// The operations of gemma2.h except attention. With one thread and with several, whole and in parts, they must give the
// same bits, and for numbers that are not wild, results close to plain loops in f64.
#include "native.h"

namespace fuzz {
namespace {

using arcmerge::item_size;

// A number of rows that are summed in the same way as all `count` rows: more than 16 or not.
Count some_rows(Input& in, Count count) {
  if (count > 16) return 17 + in.below(std::min<Count>(count - 16, 200));
  return count ? 1 + in.below(count) : 0;
}

bool same_rows(const Memory& whole, Count stride, const Memory& part, Count bytes, Count rows) {
  for (Count row = 0; row < rows; ++row)
    if (std::memcmp(whole.address + row * stride, part.address + row * bytes, bytes) != 0) return false;
  return true;
}

double dot(const Memory& x, Count t, const Memory& weight, Count row, Count length, DType dtype) {
  double sum = 0;
  for (Count i = 0; i < length; ++i)
    sum += double(value_of(x.address, dtype, t * length + i)) * value_of(weight.address, dtype, row * length + i);
  return sum;
}

double tolerance(double expected, Count length, DType dtype) {
  return 1e-6 * double(length + 1) + std::fabs(expected) * (dtype == DType::bf16 ? 0x1p-8 : 0x1p-20);
}

void linear(Input& in) {
  const DType dtype = in.activation();
  const bool wild = in.byte() % 4 == 0;
  const Count count = in.count(in.byte() == 0 ? 800 : 70), some = some_rows(in, count), number = 1 + in.below(3);
  Count rows[3] = {}, all = 0;
  for (Count i = 0; i < number; ++i) all += rows[i] = in.count(150);
  const Count length = in.count(std::min<Count>(4100, 100000 / (1 + count * all)));
  const Memory x = tensor(in, count * length, dtype, wild, in.below(4));
  std::vector<Memory> memory;
  std::vector<arcmerge::Matrix> weights;
  for (Count i = 0; i < number; ++i) {
    memory.push_back(tensor(in, rows[i] * length, dtype, wild, in.below(4)));
    weights.push_back({memory[i].address, rows[i]});
  }
  use_any_variant(in);
  use_threads(in, in.flag());
  const Memory out(count * all * item_size(dtype), in.below(4));
  arcmerge::linear(out.address, x.address, count, length, weights, dtype);
  use_threads(in, true);
  for (Count i = 0, before = 0; i < number; before += rows[i++]) {
    const Count bytes = rows[i] * item_size(dtype);
    const Memory part(some * bytes, in.below(4), 0x5a), some_x(x.bytes / std::max<Count>(count, 1) * some);
    std::memcpy(some_x.address, x.address, some_x.bytes);
    arcmerge::linear(part.address, some_x.address, some, length, {weights[i]}, dtype);
    const Memory columns(count * bytes);
    for (Count t = 0; t < count; ++t)
      std::memcpy(columns.address + t * bytes, out.address + (t * all + before) * item_size(dtype), bytes);
    require(same_rows(columns, bytes, part, bytes, some), "linear: bits of a row by itself");
    for (Count t = 0; t < count && !wild; ++t)
      for (Count row = t % 5; row < rows[i]; row += 5) {
        const double expected = dot(x, t, memory[i], row, length, dtype);
        require(
            close(value_of(columns.address, dtype, t * rows[i] + row), expected, tolerance(expected, length, dtype)),
            "linear");
      }
  }
}

void linear_geglu(Input& in) {
  const DType dtype = in.activation();
  const bool wild = in.byte() % 4 == 0;
  const Count count = in.count(70), rows = in.count(150), some = some_rows(in, count);
  const Count length = in.count(std::min<Count>(4100, 100000 / (1 + count * rows)));
  const Memory x = tensor(in, count * length, dtype, wild), gate = tensor(in, rows * length, dtype, wild, in.below(4));
  const Memory up = tensor(in, rows * length, dtype, wild, in.below(4));
  const Count bytes = rows * item_size(dtype);
  const Memory out(count * bytes, in.below(4)), part(some * bytes, 0, 0x5a);
  use_any_variant(in);
  use_threads(in, false);
  arcmerge::linear_geglu(out.address, x.address, count, length, gate.address, up.address, rows, dtype);
  use_threads(in, true);
  arcmerge::linear_geglu(part.address, x.address, some, length, gate.address, up.address, rows, dtype);
  require(same_rows(out, bytes, part, bytes, some), "linear_geglu: bits of a row by itself");
  if (dtype != DType::f32) return;
  const Memory gates(out.bytes), ups(out.bytes), product(out.bytes);
  arcmerge::linear(gates.address, x.address, count, length, {{gate.address, rows}}, dtype);
  arcmerge::linear(ups.address, x.address, count, length, {{up.address, rows}}, dtype);
  arcmerge::geglu(product.address, gates.address, rows, ups.address, rows, count, rows, dtype, false);
  require(out == product, "linear_geglu: the geglu of two products");
}

void geglu(Input& in) {
  const DType dtype = in.activation();
  const bool wild = in.flag(), stepwise = in.flag();
  const Count rows = in.count(70), columns = in.count(rows < 5 ? 4100 : 200), item = item_size(dtype);
  const Count strides[] = {columns + in.below(20), columns + in.below(20)};
  const auto states = [&](Count stride) {
    return tensor(in, rows ? (rows - 1) * stride + columns : 0, dtype, wild, in.below(4));
  };
  const Memory gate = states(strides[0]), up = states(strides[1]), out(rows * columns * item, in.below(4));
  use_any_variant(in);
  use_threads(in, true);
  arcmerge::geglu(out.address, gate.address, strides[0], up.address, strides[1], rows, columns, dtype, stepwise);
  use_any_variant(in);
  use_threads(in, false);
  for (Count row = 0; row < rows; ++row) {
    const Memory alone(columns * item, 0, 0x5a);
    const char *gates = gate.address + row * strides[0] * item, *ups = up.address + row * strides[1] * item;
    arcmerge::geglu(alone.address, gates, columns, ups, columns, 1, columns, dtype, stepwise);
    require(std::memcmp(alone.address, out.address + row * columns * item, columns * item) == 0, "geglu of one row");
    for (Count i = 0; i < columns && !wild; ++i) {
      const double g = value_of(gates, dtype, i), u = value_of(ups, dtype, i);
      const double expected = g / 2 * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) * u;
      require(close(value_of(alone.address, dtype, i), expected, 1e-6 + std::fabs(expected) * 0x1p-7), "geglu");
    }
  }
}

void rmsnorm(Input& in) {
  const DType dtype = in.activation(), x_dtype = in.activation();
  const bool wild = in.flag(), adds = in.flag();
  const Count rows = in.count(70), columns = 1 + in.count(rows < 5 ? 4100 : 200);
  const Memory x = tensor(in, rows * columns, adds ? dtype : x_dtype, wild, in.below(4));
  const Memory residual = tensor(in, rows * columns, x_dtype, wild, in.below(4));
  const Memory post = tensor(in, columns, dtype, wild, in.below(4)),
               pre = tensor(in, columns, dtype, wild, in.below(4));
  const double eps = in.flag() ? 1e-6 : 0;
  const auto norm = [&](const Memory& out, const Memory& total, Count row, Count count) {
    const Count skip = row * columns, item = item_size(dtype), x_item = item_size(x_dtype);
    char* normed = out.address + skip * item;
    if (adds)
      arcmerge::rmsnorm_add_rmsnorm(total.address + skip * x_item, normed, x.address + skip * item,
                                    residual.address + skip * x_item, x_dtype, post.address, pre.address, dtype, count,
                                    columns, eps);
    else
      arcmerge::rmsnorm(normed, x.address + skip * x_item, x_dtype, post.address, dtype, count, columns, eps);
  };
  const Memory out(rows * columns * item_size(dtype), in.below(4)), again(out.bytes, 0, 0x5a);
  const Memory total(residual.bytes, in.below(4), 0), total_again(residual.bytes, 0, adds ? 0x5a : 0);
  use_any_variant(in);
  use_threads(in, true);
  norm(out, total, 0, rows);
  use_any_variant(in);
  use_threads(in, false);
  for (Count row = 0; row < rows; ++row) norm(again, total_again, row, 1);
  require(out == again && total == total_again, "rmsnorm of one row");
  for (Count row = 0; row < rows && !wild && !adds; ++row) {
    double squares = 0;
    for (Count i = 0; i < columns; ++i) squares += std::pow(value_of(x.address, x_dtype, row * columns + i), 2);
    for (Count i = 0; i < columns && squares > 0; ++i) {
      const double expected = value_of(x.address, x_dtype, row * columns + i) / std::sqrt(squares / columns + eps) *
                              (1 + double(value_of(post.address, dtype, i)));
      require(close(value_of(out.address, dtype, row * columns + i), expected, 1e-5 + std::fabs(expected) * 0x1p-8),
              "rmsnorm");
    }
  }
}

void head(Input& in) {
  const DType dtype = in.activation();
  const bool wild = in.byte() % 4 == 0;
  const bool many = in.byte() == 0;  // more tokens than lm_head keeps at a time
  const Count count = many ? 1020 + in.below(10) : in.count(70), ids = 1 + in.count(many ? 20 : 1100);
  const Count length = in.count(std::min<Count>(600, 60000 / (1 + count * ids)));
  const Memory x = tensor(in, count * length, dtype, wild, in.below(4));
  const Memory weight = tensor(in, ids * length, dtype, wild, in.below(4));
  const arcmerge::LmHead head{x.address, weight.address, count, ids, length, dtype, in.flag() ? 30.0f : 0.0f};
  const Count tiles = (ids + arcmerge::kLmHeadTile - 1) / arcmerge::kLmHeadTile, words = (ids + 31) / 32;
  const Memory plain(count * ids * 4), scores(plain.bytes), maxima(count * tiles * 4), best(count * 8);
  const Memory logprob(count * 4), chosen(count * 8), seen(count * words * 4);
  for (Count i = 0; i < seen.bytes; ++i) seen.address[i] = char(in.random());
  for (Count t = 0; t < count; ++t) chosen.as<Count>()[t] = Count(in.random() % std::uint64_t(ids));
  const bool some_seen = in.flag(), with_maxima = in.flag(), choose = in.flag();
  const float penalty = 0.25f + float(in.below(16)) / 8, temperature = 0.25f + float(in.below(16)) / 8;

  use_any_variant(in);
  use_threads(in, false);
  arcmerge::lm_head_scores(plain.as<float>(), nullptr, head, {});
  use_threads(in, true);
  arcmerge::lm_head_scores(scores.as<float>(), with_maxima ? maxima.as<float>() : nullptr, head,
                           {some_seen ? seen.as<std::uint32_t>() : nullptr, penalty, temperature});
  arcmerge::lm_head_logprob(logprob.as<float>(), best.as<Count>(), head, choose ? chosen.as<Count>() : nullptr);
  for (Count t = 0; t < count; ++t) {
    const float *logits = plain.as<float>() + t * ids, *score = scores.as<float>() + t * ids;
    const Count found = best.as<Count>()[t];
    require(found >= 0 && found < ids, "lm_head_logprob: an id");
    if (wild) continue;
    require(found == std::max_element(logits, logits + ids) - logits, "lm_head_logprob: the best id");
    double sum = 0;
    for (Count id = 0; id < ids; ++id) {
      float expected = logits[id];
      if (some_seen && seen.as<std::uint32_t>()[t * words + id / 32] >> id % 32 & 1)
        expected = expected > 0 ? expected / penalty : expected * penalty;
      require(score[id] == (temperature == 1 ? expected : expected / temperature), "lm_head_scores");
      if (id % 5 == t % 5) {
        double product = dot(x, t, weight, id, length, dtype);
        if (head.softcap) product = head.softcap * std::tanh(product / head.softcap);
        require(close(logits[id], product, tolerance(product, length, DType::f32)), "lm_head_scores: a logit");
      }
      sum += std::exp(double(logits[id]) - logits[found]);
    }
    for (Count tile = 0; tile < tiles && with_maxima; ++tile)
      require(maxima.as<float>()[t * tiles + tile] ==
                  *std::max_element(score + tile * 128, score + std::min(ids, tile * 128 + 128)),
              "lm_head_scores: maxima");
    if (choose)
      require(
          close(logprob.as<float>()[t], double(logits[chosen.as<Count>()[t]]) - logits[found] - std::log(sum), 1e-3),
          "lm_head_logprob");
  }
}

// The first word of Philox-4x32-10 of the counter (id, step).
std::uint32_t philox(std::uint32_t id, std::uint64_t step, std::uint64_t seed) {
  std::uint32_t c[4] = {id, std::uint32_t(step), std::uint32_t(step >> 32), 0};
  std::uint32_t low = std::uint32_t(seed), high = std::uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, low += 0x9e3779b9u, high += 0xbb67ae85u) {
    const std::uint64_t first = 0xd2511f53ull * c[0], second = 0xcd9e8d57ull * c[2];
    const std::uint32_t next[] = {std::uint32_t(second >> 32) ^ c[1] ^ low, std::uint32_t(second),
                                  std::uint32_t(first >> 32) ^ c[3] ^ high, std::uint32_t(first)};
    std::copy(next, next + 4, c);
  }
  return c[0];
}

void lm_head_draw(Input& in) {
  const Count count = in.below(5), ids = 1 + in.count(count < 3 ? 8200 : 300);
  const Memory scores = tensor(in, count * ids, DType::f32, false), steps(count * 8), out(count * 8);
  const std::uint64_t seed = in.random();
  const std::uint8_t kept = in.byte();
  for (Count i = 0; i < count * ids; ++i)
    if (in.random() % 256 < kept) scores.as<float>()[i] = -std::numeric_limits<float>::infinity();
  for (Count t = 0; t < count; ++t) steps.as<std::uint64_t>()[t] = in.random() >> in.below(64);
  use_any_variant(in);
  use_threads(in, true);
  arcmerge::lm_head_draw(out.as<Count>(), scores.as<float>(), count, ids, seed, steps.as<Count>());
  for (Count t = 0; t < count; ++t) {
    Count expected = 0;
    float best = -std::numeric_limits<float>::infinity();
    for (Count id = 0; id < ids; ++id) {
      const float score = scores.as<float>()[t * ids + id];
      if (std::isinf(score)) continue;
      const float value = (float(philox(std::uint32_t(id), steps.as<std::uint64_t>()[t], seed)) + 0.5f) * 0x1p-32f;
      const float noisy = score - std::log(-std::log1p(-(value < 1 ? value : 1 - 0x1p-24f)));
      if (noisy > best) best = noisy, expected = id;
    }
    require(out.as<Count>()[t] == expected, "lm_head_draw");
  }
}

void read(Input& in) {
  const Memory bytes((in.byte() == 0 ? 1 << 20 : 0) + in.count(9000), in.below(8));
  use_any_variant(in);
  use_threads(in, true);
  arcmerge::read(bytes.address, bytes.bytes);
}

}  // namespace

void model_operation(Input& in) {
  constexpr void (*kOperations[])(Input&) = {linear, linear_geglu, geglu, rmsnorm, head, lm_head_draw, read};
  kOperations[in.below(std::size(kOperations))](in);
}

}  // namespace fuzz
