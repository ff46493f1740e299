// The native operations that merge checkpoints. They take raw addresses and 64-bit counts, and use neither Python nor
// torch.
//
// Every operation runs on the calling thread and reads elements [first, first + count) of its operands, so that a
// caller can divide the work among threads by ranges. Results do not depend on the variant of the code that runs
// (variant.h), nor on the ranges, except those of `gram`, which is the same for the same ranges. Addresses need no
// alignment, and outputs must not overlap inputs. An operation that gets wrong arguments throws std::invalid_argument
// before it touches memory.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace arcmerge {

enum class DType : int { bf16 = 0, f16 = 1, f32 = 2 };

inline std::int64_t item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// One input tensor: row-major elements of `dtype`, each of which is widened to f32 when it is read.
struct Operand {
  const char* address = nullptr;
  DType dtype = DType::bf16;
  bool casts = false;  // whether every value is rounded to `cast` (to nearest even) before it is used
  DType cast = DType::f32;
  const std::uint64_t* rows = nullptr;  // the address of each row of `columns` elements; replaces `address`
  std::int64_t columns = 0;
};

// out[i][j] = sum of x_i * x_j, or with a base, of (x_i - base) * (x_j - base), where the differences are in f32.
// out: [k][k]. Products are summed in f64, in which they are exact.
void gram(const std::vector<Operand>& operands, const Operand* base, std::int64_t first, std::int64_t count,
          double* out);

// The same for each row of matrices with `rows` rows and `columns` columns, out: [rows][k][k], or for each column,
// out: [columns][k][k].
void gram_of_rows(const std::vector<Operand>& operands, const Operand* base, std::int64_t rows, std::int64_t columns,
                  double* out);
void gram_of_columns(const std::vector<Operand>& operands, const Operand* base, std::int64_t rows, std::int64_t columns,
                     double* out);

// out[i] = round(c_0 * x_0[first + i] + c_1 * x_1[first + i] + ...), added from left to right in f32 without FMA and
// rounded once, to nearest even. Every NaN is written as the quiet positive NaN. Returns the number of outputs that are
// not finite.
std::int64_t combine(void* out, DType out_dtype, const std::vector<Operand>& operands,
                     const std::vector<float>& coefficients, std::int64_t first, std::int64_t count);

// The same with separate coefficients for each row or each column of matrices with `columns` columns.
// coefficients: [rows or columns][k].
std::int64_t combine_rows(void* out, DType out_dtype, const std::vector<Operand>& operands, const float* coefficients,
                          std::int64_t first, std::int64_t count, std::int64_t columns);
std::int64_t combine_columns(void* out, DType out_dtype, const std::vector<Operand>& operands,
                             const float* coefficients, std::int64_t first, std::int64_t count, std::int64_t columns);

// out = w * b + (1 - w) * a with w = clamp(t / max(|b - a|, 1e-6), 0, 1), in f32. Returns the number of outputs that
// are not finite.
std::int64_t nearswap(void* out, DType out_dtype, const Operand& a, const Operand& b, float t, std::int64_t first,
                      std::int64_t count);

// out = base + factor * d, where d is the x_i - base of the largest magnitude, the first of equal ones, in f32. Returns
// the number of outputs that are not finite, as a difference that is not finite makes them.
std::int64_t magmax(void* out, DType out_dtype, const std::vector<Operand>& operands, const Operand& base, float factor,
                    std::int64_t first, std::int64_t count);

// out = the median of all operands; for an even number of them a / 2 + b / 2 of the two in the middle, in f32. Returns
// the number of outputs that are not finite, as an operand that is not finite makes them.
std::int64_t median(void* out, DType out_dtype, const std::vector<Operand>& operands, std::int64_t first,
                    std::int64_t count);

// The number of elements that are infinite or NaN after the operand's cast.
std::int64_t count_nonfinite(const Operand& operand, std::int64_t first, std::int64_t count);

// out[c] = the sum of column c in f64. out: [columns].
void column_sums(const Operand& operand, std::int64_t rows, std::int64_t columns, double* out);

// What selects elements of differences x_i - base by magnitude and at random: python/arcmerge/ops/selection.py.
struct Selection {
  struct Cut {
    std::int64_t upper, upper_rank, lower, lower_rank;
  };
  std::vector<Cut> cuts;
  std::vector<std::uint64_t> keys;
  std::vector<std::pair<double, double>> probabilities;  // of the smallest and the largest element of a row
  std::int64_t columns = 0;                              // the length of a row
  bool joint = false, rounded = false;
  const float* row_scales = nullptr;  // one for each row of the whole tensors, if any
  // If any, for each input the bits of all elements, 32 bytes for each 256 of them (mask_bits.h); null for an input
  // that has none. l1_norms sets the bits of elements that random numbers keep, from a multiple of 256 on; others read
  // them in place of drawing numbers.
  std::vector<std::uint8_t*> masks;
};

// How selected elements make a result: python/arcmerge/ops/consensus_combine.py.
enum class Election : int { none = 0, sum = 1, count = 2 };
struct Consensus {
  struct Factors {
    float vote, value, share, alone;
  };
  std::vector<Factors> factors;
  Election election = Election::none;
  bool zero_is_negative = false;
  float floor = 0;
  bool inverse = false;
};

// How many elements before a range have the upper and the lower code of an input's cut.
using EqualsBefore = std::pair<std::int64_t, std::int64_t>;

// Adds to out, [k][planes][32768], the number of elements whose codes have each prefix, the upper 15 bits. Planes:
// dropped and kept by random numbers, and unless codes are rounded, the sums of the lower 16 bits of both. Cuts are
// ignored.
void magnitude_histogram(std::int64_t* out, const std::vector<Operand>& operands, const Operand& base,
                         const Selection& selection, std::int64_t first, std::int64_t count);

// Adds to out, [k][P][65536], the number of elements with each code that starts with prefixes[i][p], in [k][P].
void magnitude_histogram_within(std::int64_t* out, const std::vector<Operand>& operands, const Operand& base,
                                const Selection& selection, const std::vector<std::vector<std::int64_t>>& prefixes,
                                std::int64_t first, std::int64_t count);

// Adds to out, [k][2][256], the sums of the magnitudes of elements that random numbers drop and of those that they
// keep: whole numbers n_e for which the sum of n_e * 2^(max(e, 1) - 150) over e < 255 is that of the finite magnitudes.
// n_255 is not 0 if a magnitude is infinite or NaN. Cuts are ignored.
void l1_norms(std::int64_t* out, const std::vector<Operand>& operands, const Operand& base, const Selection& selection,
              std::int64_t first, std::int64_t count);

// out[e] = base + the sum of values / the sum of shares, over the inputs whose element is selected and agrees. Returns
// the number of outputs that are not finite.
std::int64_t consensus_combine(void* out, DType out_dtype, const std::vector<Operand>& operands, const Operand& base,
                               const Selection& selection, const Consensus& consensus,
                               const std::vector<EqualsBefore>& before, std::int64_t first, std::int64_t count);

// What consensus_combine adds up: for each input, the sum of squares of its selected elements, in f64 in the order of
// `gram`; how many elements it changes alone and how many with others; and how many more elements have a positive sum
// of votes than a negative one, 0 without an election. Where a difference is not finite, results are not defined.
struct ConsensusSums {
  std::vector<double> squares;
  std::vector<std::int64_t> alone, shared;
  std::int64_t balance = 0;
};
ConsensusSums consensus_sums(const std::vector<Operand>& operands, const Operand& base, const Selection& selection,
                             const Consensus& consensus, const std::vector<EqualsBefore>& before, std::int64_t first,
                             std::int64_t count);

// out[r] = the Kullback-Leibler divergence of softmax(x) from softmax(base) in row first_row + r of `columns` elements,
// computed in f64 and rounded once; NaN for rows that are not finite. out: [rows].
void row_divergences(float* out, const Operand& x, const Operand& base, std::int64_t columns, std::int64_t first_row,
                     std::int64_t rows);

// The variants that this processor can run, best first; the variant in use; the choice of another one.
std::vector<std::string> variants();
std::string variant();
void use_variant(const std::string& name);

}  // namespace arcmerge
