// The native operations of arcmerge: raw addresses and 64-bit counts in, numbers out. No Python, no torch.
//
// Every operation is single-threaded and reads [first, first + count) of its operands, so a caller spreads work over
// threads by ranges. Results depend neither on that split (gram: as long as the ranges are the same) nor on the
// variant of the code that runs (variant.h). Addresses need no alignment; outputs must not overlap inputs.
// All of them throw std::invalid_argument, with a sentence, before they touch memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace arcmerge {

constexpr int kMaxOperands = 8;

enum class DType : int { bf16 = 0, f16 = 1, f32 = 2 };

inline std::int64_t item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// One input tensor as a kernel sees it: row-major elements of `dtype`, each widened to f32 when read.
struct Operand {
  const char* address = nullptr;
  DType dtype = DType::bf16;
  bool casts = false;  // round every value to `cast` (nearest even) before it is used
  DType cast = DType::f32;
  const std::uint64_t* rows = nullptr;  // where each row of `columns` elements lies; `address` is then ignored
  std::int64_t columns = 0;
};

// out[i * k + j] = sum of x_i * x_j, of (x_i - base) * (x_j - base) with a base (the difference in f32). out: k * k.
// Products are exact in f64, in which they are summed.
void gram(const std::vector<Operand>& operands, const Operand* base, std::int64_t first, std::int64_t count,
          double* out);

// The same for every vector of (rows, columns) matrices: the rows (out: rows * k * k) or the columns
// (out: columns * k * k).
void gram_of_rows(const std::vector<Operand>& operands, const Operand* base, std::int64_t rows, std::int64_t columns,
                  double* out);
void gram_of_columns(const std::vector<Operand>& operands, const Operand* base, std::int64_t rows, std::int64_t columns,
                     double* out);

// out[i] = round(c_0 * x_0[first + i] + c_1 * x_1[first + i] + ...) from left to right in f32 without FMA, one final
// rounding to nearest even. Any NaN is written as the quiet positive one. Returns how many outputs are not finite.
std::int64_t combine(void* out, DType out_dtype, const std::vector<Operand>& operands,
                     const std::vector<float>& coefficients, std::int64_t first, std::int64_t count);

// The same with coefficients of their own for every row or column of matrices with `columns` columns.
// coefficients: [rows or columns][k].
std::int64_t combine_rows(void* out, DType out_dtype, const std::vector<Operand>& operands, const float* coefficients,
                          std::int64_t first, std::int64_t count, std::int64_t columns);
std::int64_t combine_columns(void* out, DType out_dtype, const std::vector<Operand>& operands,
                             const float* coefficients, std::int64_t first, std::int64_t count, std::int64_t columns);

// out = w * b + (1 - w) * a with w = clamp(t / max(|b - a|, 1e-6), 0, 1), in f32. Returns as combine does.
std::int64_t nearswap(void* out, DType out_dtype, const Operand& a, const Operand& b, float t, std::int64_t first,
                      std::int64_t count);

std::int64_t count_nonfinite(const Operand& operand, std::int64_t first, std::int64_t count);

// out[c] = sum of column c, in f64. out: columns.
void column_sums(const Operand& operand, std::int64_t rows, std::int64_t columns, double* out);

// The variants this processor can run, best first; the one in use; and the choice of another.
std::vector<std::string> variants();
std::string variant();
void use_variant(const std::string& name);

}  // namespace arcmerge
