// The operations of merge.h, each called twice: with operands in place, and with the addresses of rows elsewhere,
// another variant and other ranges. Both must give the bits of plain loops.
#include <stdexcept>

#include "cpu/matmul/transpose.h"
#include "operands.h"

namespace fuzz {
namespace {

// Dot products of elements first, first + step, ... in 16 lanes, or in one.
double dot(const Case& of, Count i, Count j, Count first, Count step, Count count, Count lanes) {
  double sums[16] = {}, total = 0;
  for (Count e = 0; e < count; ++e)
    sums[e % lanes] += double(of.value(i, first + e * step)) * double(of.value(j, first + e * step));
  for (Count lane = 0; lane < lanes; ++lane) total += sums[lane];
  return lanes == 1 ? sums[0] : total;
}

void gram(Input& in) {
  const Case of(in);
  const Count k = of.k(), kind = in.below(3);
  const Count vectors = kind == 0 ? 1 : kind == 1 ? of.rows : of.columns;
  const Memory whole(vectors * k * k * 8), parts(whole.bytes);
  for (const bool in_parts : {false, true}) {
    const std::vector<Operand>& operands = in_parts ? of.parts : of.whole;
    Operand base;
    if (of.base) base = in_parts ? of.base->by_rows() : of.base->in_place();
    const Operand* pointer = of.base ? &base : nullptr;
    double* out = (in_parts ? parts : whole).as<double>();
    use_any_variant(in);
    if (kind == 0) arcmerge::gram(operands, pointer, of.first, of.count, out);
    if (kind == 1) arcmerge::gram_of_rows(operands, pointer, of.rows, of.columns, out);
    if (kind == 2) arcmerge::gram_of_columns(operands, pointer, of.rows, of.columns, out);
  }
  for (Count cell = 0; cell < vectors * k * k; ++cell) {
    const Count vector = cell / (k * k), i = cell / k % k, j = cell % k;
    const double found = whole.as<double>()[cell];
    require(same(found, parts.as<double>()[cell]), "gram in other places");
    require(same(found, whole.as<double>()[(vector * k + j) * k + i]), "gram: symmetry");
    if (i <= j)
      require(same(found, kind == 0   ? dot(of, i, j, of.first, 1, of.count, 16)
                          : kind == 1 ? dot(of, i, j, vector * of.columns, 1, of.columns, 16)
                                      : dot(of, i, j, vector, of.columns, of.rows, 1)),
              "gram");
  }
}

enum class Along { all, rows, columns };

void combine(Input& in) {
  const Case of(in);
  const Count k = of.k(), size = in.flag() ? 4 : 2;
  const DType dtype = size == 4 ? DType::f32 : in.flag() ? DType::f16 : DType::bf16;
  const Along along = Along(in.below(3));
  const Count sets = along == Along::all ? 1 : along == Along::rows ? of.rows : of.columns;
  const Memory coefficients = tensor(in, sets * k, DType::f32, in.byte() % 8 == 0);
  const float* c = coefficients.as<float>();

  const Memory expected(of.count * arcmerge::item_size(dtype));
  Count nonfinite = 0;
  for (Count i = 0; i < of.count; ++i) {
    const Count set = along == Along::all    ? 0
                      : along == Along::rows ? (of.first + i) / of.columns
                                             : (of.first + i) % of.columns;
    float sum = c[set * k] * of.sources[0][of.first + i];
    for (Count j = 1; j < k; ++j) sum += c[set * k + j] * of.sources[j][of.first + i];
    put_value(expected.address, dtype, i, sum);
    nonfinite += !std::isfinite(value_of(expected.address, dtype, i));
  }
  for (const bool in_parts : {false, true}) {
    const std::vector<Operand>& operands = in_parts ? of.parts : of.whole;
    const Memory out(expected.bytes, in.below(8), in_parts ? 0 : 0xff);
    const Count piece = in_parts ? 1 + in.count(of.count) : std::max<Count>(of.count, 1);
    use_any_variant(in);
    Count found = 0;
    for (Count done = 0; done < of.count; done += piece) {
      char* to = out.address + done * arcmerge::item_size(dtype);
      const Count first = of.first + done, count = std::min(piece, of.count - done);
      found += along == Along::all ? arcmerge::combine(to, dtype, operands, std::vector<float>(c, c + k), first, count)
                                   : (along == Along::rows ? arcmerge::combine_rows : arcmerge::combine_columns)(
                                         to, dtype, operands, c, first, count, of.columns);
    }
    require(out == expected, "combine");
    require(found == nonfinite, "combine: how many are not finite");
  }
}

void nearswap(Input& in) {
  const Case of(in);
  const Source &a = of.sources[0], &b = of.sources[of.k() - 1];
  const DType dtype = in.dtype();
  const float t = float(in.byte()) / 64 - 1;
  const Memory expected(of.count * arcmerge::item_size(dtype));
  Count nonfinite = 0;
  for (Count i = 0; i < of.count; ++i) {
    const float from = a[of.first + i], to = b[of.first + i], distance = std::fabs(to - from);
    const float ratio = t / (distance > 1e-6f ? distance : 1e-6f);
    const float weight = ratio > 0 ? std::min(ratio, 1.0f) : 0.0f;
    put_value(expected.address, dtype, i, weight * to + (1 - weight) * from);
    nonfinite += !std::isfinite(value_of(expected.address, dtype, i));
  }
  for (const bool in_parts : {false, true}) {
    const std::vector<Operand>& operands = in_parts ? of.parts : of.whole;
    const Memory out(expected.bytes, in.below(8));
    use_any_variant(in);
    const Count found =
        arcmerge::nearswap(out.address, dtype, operands.front(), operands.back(), t, of.first, of.count);
    require(out == expected, "nearswap");
    require(found == nonfinite, "nearswap: how many are not finite");
  }
}

void count_nonfinite(Input& in) {
  const Case of(in);
  Count expected = 0;
  for (Count i = 0; i < of.count; ++i) expected += !std::isfinite(of.sources[0][of.first + i]);
  for (const Operand& operand : {of.whole[0], of.parts[0]}) {
    use_any_variant(in);
    require(arcmerge::count_nonfinite(operand, of.first, of.count) == expected, "count_nonfinite");
  }
}

void column_sums(Input& in) {
  const Case of(in);
  for (const Operand& operand : {of.whole[0], of.parts[0]}) {
    const Memory out(of.columns * 8);
    use_any_variant(in);
    arcmerge::column_sums(operand, of.rows, of.columns, out.as<double>());
    for (Count column = 0; column < of.columns; ++column) {
      double sum = 0;
      for (Count row = 0; row < of.rows; ++row) sum += double(of.sources[0][row * of.columns + column]);
      require(same(out.as<double>()[column], sum), "column_sums");
    }
  }
}

void transpose(Input& in) {
  const Count rows = in.count(130), words = in.count(130), stride = words * 4 + in.below(9);
  const Count columns = rows + in.below(20);
  const Memory source(rows ? (rows - 1) * stride + words * 4 : 0, in.below(4));
  for (Count i = 0; i < source.bytes; ++i) source.address[i] = char(in.random());
  const Memory out(words ? ((words - 1) * columns + rows) * 4 : 0);
  use_any_variant(in);
  arcmerge::transpose(out.as<std::uint32_t>(), columns, source.address, stride, rows, words);
  for (Count row = 0; row < rows; ++row)
    for (Count word = 0; word < words; ++word)
      require(std::memcmp(out.address + (word * columns + row) * 4, source.address + row * stride + word * 4, 4) == 0,
              "transpose");
}

// Wrong arguments are refused before memory is touched.
void refusals(Input& in) {
  const Count negative = -1 - in.below(200), kind = in.below(5);
  const std::vector<Operand> operands(kind == 0 ? 0 : 2);
  const std::vector<float> coefficients(operands.size() + (kind == 1));
  const Count first = kind == 2 ? negative : 0, count = kind == 3 ? negative : 1, columns = kind == 4 ? -negative : 0;
  bool refused = false;
  try {
    if (kind < 4 && in.flag())
      arcmerge::combine(nullptr, in.dtype(), operands, coefficients, first, count);
    else if (kind == 4)
      arcmerge::gram_of_columns(operands, nullptr, negative, columns, nullptr);
    else
      arcmerge::combine_rows(nullptr, in.dtype(), operands, nullptr, first, count, columns);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  require(refused, "a call that must be refused");
}

}  // namespace

void use_any_variant(Input& in) {
  static const std::vector<std::string> names = arcmerge::variants();
  arcmerge::use_variant(names[in.below(Count(names.size()))]);
}

void merge_operation(Input& in) {
  constexpr void (*kOperations[])(Input&) = {gram,        combine,   nearswap, count_nonfinite,
                                             column_sums, transpose, refusals};
  kOperations[in.below(std::size(kOperations))](in);
}

}  // namespace fuzz
