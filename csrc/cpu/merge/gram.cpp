// gram: the sums of products from which a merge method computes its coefficients. It reads each operand once.
//
// All sums are in f64, in which products of bf16, f16 and f32 are exact. Sums of blocks in f32 would be too small by
// 1e-8 even for blocks of eight elements: the square of an odd significand is 1 modulo 8, so that the rounding of a sum
// of squares drops less than one half more often than more.
//
// Sums run in kLanes lanes (constants.h).
#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/simd/constants.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/variant.h"
#include "merge.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arcmerge {
namespace {

static_assert(kTile % kLanes == 0, "a tile fills its lanes evenly");

// Operations on registers of f64. As products are exact, a fused multiply-add gives the same bits as two operations.
template <class Isa>
struct Doubles {
  typedef typename Vector<Isa>::F64 F64;
  typedef typename Vector<Isa>::HalfF32 F32;

  static inline void widen(F64& out, const F32& x) { out = __builtin_convertvector(x, F64); }
  static inline void add_product(F64& sum, const F64& x, const F64& y) { sum += x * y; }
};

#if defined(__x86_64__)
// GCC 12 would widen by half registers, and -ffp-contract=off forbids it to fuse. These intrinsics raise the speed in
// L2 from 15 and 12 to 25 and 16 GB/s (one core of an EPYC 9004).
template <>
struct Doubles<Avx512> {
  typedef Vector<Avx512>::F64 F64;
  typedef Vector<Avx512>::HalfF32 F32;

  ARCMERGE_AVX512 static inline void widen(F64& out, const F32& x) { out = (F64)_mm512_cvtps_pd((__m256)x); }
  ARCMERGE_AVX512 static inline void add_product(F64& sum, const F64& x, const F64& y) {
    sum = (F64)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)sum);
  }
};
template <>
struct Doubles<Avx512Bf16> : Doubles<Avx512> {};
template <>
struct Doubles<Avx2> {
  typedef Vector<Avx2>::F64 F64;
  typedef Vector<Avx2>::HalfF32 F32;

  ARCMERGE_AVX2 static inline void widen(F64& out, const F32& x) { out = (F64)_mm256_cvtps_pd((__m128)x); }
  ARCMERGE_AVX2 static inline void add_product(F64& sum, const F64& x, const F64& y) {
    sum = (F64)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)sum);
  }
};
#endif

// kLanes bf16 values in f64. Two values share a 32-bit word, with the even element in the lower half.
template <class Isa>
struct Lanes {
  using F64 = typename Doubles<Isa>::F64;
  using F32 = typename Doubles<Isa>::F32;
  using U32 = typename Vector<Isa>::HalfU32;
  static constexpr int kParts = kLanes / 2 * 8 / Isa::kBytes;
  F64 even[kParts] = {}, odd[kParts] = {};

  inline void load_bf16(const char* source) {
    for (int part = 0; part < kParts; ++part) {
      U32 words;
      std::memcpy(&words, source + part * sizeof words, sizeof words);
      Doubles<Isa>::widen(even[part], (F32)(words << 16));
      Doubles<Isa>::widen(odd[part], (F32)(words & 0xffff0000u));
    }
  }

  inline void add_product(const Lanes& x, const Lanes& y) {
    for (int part = 0; part < kParts; ++part) {
      Doubles<Isa>::add_product(even[part], x.even[part], y.even[part]);
      Doubles<Isa>::add_product(odd[part], x.odd[part], y.odd[part]);
    }
  }

  inline void store(double* lanes) const {
    double in_order[2][kLanes / 2];
    std::memcpy(in_order[0], even, sizeof even);
    std::memcpy(in_order[1], odd, sizeof odd);
    for (int i = 0; i < kLanes; ++i) lanes[i] = in_order[i % 2][i / 2];
  }
};

// The fast path for two bf16 operands: the sums aa, ab and bb.
template <class Isa>
struct PairSums {
  Lanes<Isa> aa, ab, bb;

  inline void add(const char* a, const char* b) {
    Lanes<Isa> x, y;
    x.load_bf16(a);
    y.load_bf16(b);
    aa.add_product(x, x);
    ab.add_product(x, y);
    bb.add_product(y, y);
  }
};

template <class Isa>
inline void bf16_pair_body(const char* a, const char* b, std::int64_t count, double (*lanes)[kLanes]) {
  PairSums<Isa> sums;
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums.add(a + 2 * i, b + 2 * i);
  if (i < count) {
    char last_a[2 * kLanes] = {}, last_b[2 * kLanes] = {};
    std::memcpy(last_a, a + 2 * i, 2 * (count - i));
    std::memcpy(last_b, b + 2 * i, 2 * (count - i));
    sums.add(last_a, last_b);
  }
  sums.aa.store(lanes[0]);
  sums.ab.store(lanes[1]);
  sums.bb.store(lanes[2]);
}

// lanes += the products of two tiles, which are padded with zeros to a multiple of kLanes.
template <class Isa>
inline void tile_pair_body(const float* x, const float* y, std::int64_t count, double* lanes) {
  using F64 = typename Doubles<Isa>::F64;
  using F32 = typename Doubles<Isa>::F32;
  constexpr int kParts = kLanes * 8 / Isa::kBytes, kWidth = Isa::kBytes / 8;
  F64 sums[kParts];
  std::memcpy(sums, lanes, sizeof sums);
  for (std::int64_t i = 0; i < count; i += kLanes)
    for (int part = 0; part < kParts; ++part) {
      F32 narrow_x, narrow_y;
      std::memcpy(&narrow_x, x + i + part * kWidth, sizeof narrow_x);
      std::memcpy(&narrow_y, y + i + part * kWidth, sizeof narrow_y);
      F64 wide_x, wide_y;
      Doubles<Isa>::widen(wide_x, narrow_x);
      Doubles<Isa>::widen(wide_y, narrow_y);
      Doubles<Isa>::add_product(sums[part], wide_x, wide_y);
    }
  std::memcpy(lanes, sums, sizeof sums);
}

template <class>
ARCMERGE_INLINE void subtract_body(float* x, const float* base, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] -= base[i];
}

template <class>
ARCMERGE_INLINE void add_products_body(double* sums, const float* x, const float* y, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sums[i] += double(x[i]) * double(y[i]);
}

ARCMERGE_VARIANTS(void, bf16_pair, (const char* a, const char* b, std::int64_t count, double (*lanes)[kLanes]),
                  (a, b, count, lanes))
ARCMERGE_VARIANTS(void, tile_pair, (const float* x, const float* y, std::int64_t count, double* lanes),
                  (x, y, count, lanes))
ARCMERGE_VARIANTS(void, subtract, (float* x, const float* base, std::int64_t count), (x, base, count))
ARCMERGE_VARIANTS(void, add_products, (double* sums, const float* x, const float* y, std::int64_t count),
                  (sums, x, y, count))

// One range of all operands as tiles, with the base subtracted.
class Tiles {
 public:
  explicit Tiles(std::size_t operands) : tiles_(new Tile[operands]) {}  // of any values

  const float* operator[](int i) const { return tiles_[i].values; }

  void fill(const std::vector<Operand>& operands, const Operand* base, std::int64_t first, std::int64_t count) {
    const std::int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    if (base) widen(*base, first, count, base_.values);
    for (std::size_t i = 0; i < operands.size(); ++i) {
      float* tile = tiles_[i].values;
      widen(operands[i], first, count, tile);
      if (base) subtract(tile, base_.values, count);
      std::fill(tile + count, tile + padded, 0.0f);
    }
  }

 private:
  struct alignas(64) Tile {
    float values[kTile];
  };
  std::unique_ptr<Tile[]> tiles_;
  Tile base_;
};

double sum(const double* lanes) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

void gram_of_range(const std::vector<Operand>& operands, const Operand* base, std::int64_t first, std::int64_t count,
                   double* out) {
  const int k = int(operands.size());
  const auto lanes = std::make_unique<double[][kLanes]>(std::size_t(k * (k + 1) / 2));
  if (k == 2 && !base && is_plain_bf16(operands[0]) && is_plain_bf16(operands[1])) {
    bf16_pair(operands[0].address + 2 * first, operands[1].address + 2 * first, count, lanes.get());
  } else {
    Tiles tiles(operands.size());
    for (std::int64_t done = 0; done < count; done += kTile) {
      const std::int64_t size = std::min(kTile, count - done);
      tiles.fill(operands, base, first + done, size);
      for (int i = 0, pair = 0; i < k; ++i)
        for (int j = i; j < k; ++j, ++pair) tile_pair(tiles[i], tiles[j], size, lanes[pair]);
    }
  }
  for (int i = 0, pair = 0; i < k; ++i)
    for (int j = i; j < k; ++j, ++pair) out[i * k + j] = out[j * k + i] = sum(lanes[pair]);
}

}  // namespace

void gram(const std::vector<Operand>& operands, const Operand* base, std::int64_t first, std::int64_t count,
          double* out) {
  require_operands(operands);
  require_range(first, count);
  gram_of_range(operands, base, first, count, out);
}

void gram_of_rows(const std::vector<Operand>& operands, const Operand* base, std::int64_t rows, std::int64_t columns,
                  double* out) {
  require_operands(operands);
  require_matrix(rows, columns);
  const std::int64_t cells = std::int64_t(operands.size() * operands.size());
  for (std::int64_t row = 0; row < rows; ++row)
    gram_of_range(operands, base, row * columns, columns, out + row * cells);
}

void gram_of_columns(const std::vector<Operand>& operands, const Operand* base, std::int64_t rows, std::int64_t columns,
                     double* out) {
  require_operands(operands);
  require_matrix(rows, columns);
  const int k = int(operands.size());
  Tiles tiles(operands.size());
  std::vector<double> sums(std::size_t(k * (k + 1) / 2) * kTile);
  for (std::int64_t left = 0; left < columns; left += kTile) {
    const std::int64_t width = std::min(kTile, columns - left);
    std::fill(sums.begin(), sums.end(), 0.0);
    for (std::int64_t row = 0; row < rows; ++row) {
      tiles.fill(operands, base, row * columns + left, width);
      for (int i = 0, pair = 0; i < k; ++i)
        for (int j = i; j < k; ++j, ++pair) add_products(&sums[pair * kTile], tiles[i], tiles[j], width);
    }
    for (std::int64_t column = 0; column < width; ++column) {
      double* cell = out + (left + column) * k * k;
      for (int i = 0, pair = 0; i < k; ++i)
        for (int j = i; j < k; ++j, ++pair) cell[i * k + j] = cell[j * k + i] = sums[pair * kTile + column];
    }
  }
}

}  // namespace arcmerge
