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
#include <vector>

namespace arcmerge {

constexpr int kMaxOperands = 8;

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

// The number of elements that are infinite or NaN after the operand's cast.
std::int64_t count_nonfinite(const Operand& operand, std::int64_t first, std::int64_t count);

// out[c] = the sum of column c in f64. out: [columns].
void column_sums(const Operand& operand, std::int64_t rows, std::int64_t columns, double* out);

// The variants that this processor can run, best first; the variant in use; the choice of another one.
std::vector<std::string> variants();
std::string variant();
void use_variant(const std::string& name);

}  // namespace arcmerge
