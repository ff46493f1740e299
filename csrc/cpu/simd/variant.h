// Compiles hot loops for several instruction sets, of which one is chosen at run time.
//
// A hot loop is written once, as an inline `template <class Isa> name_body`. ARCMERGE_VARIANTS compiles it, with all
// functions that it calls, for every instruction set, and defines a function `name` that calls the chosen variant.
// Bodies fix the order of all sums, and the compiler may neither fuse nor reorder operations (setup.py), so that all
// variants of merge operations give the same bits. Matrix products and the softmax of a network use the best
// instructions of a processor, and differ between variants in the last bits. GCC's -Wvector-operation-performance names
// operations that it takes apart for lack of an instruction.
#pragma once

#include <cstdint>

namespace arcmerge {

// The index of the chosen variant, in the list of variant.cpp and in the tables below.
int variant_index();

// Instruction sets. kBytes: the width of a register.
struct Baseline {
  static constexpr int kBytes = 16;
};
struct Avx2 {
  static constexpr int kBytes = 32;
};
struct Avx512 {
  static constexpr int kBytes = 64;
};
struct Avx512Bf16 : Avx512 {};

// Registers by element type, and half registers, which fill a register when their elements are widened.
template <class Isa>
struct Vector {
  typedef double F64 __attribute__((vector_size(Isa::kBytes)));
  typedef std::uint64_t U64 __attribute__((vector_size(Isa::kBytes)));
  typedef float F32 __attribute__((vector_size(Isa::kBytes)));
  typedef std::uint32_t U32 __attribute__((vector_size(Isa::kBytes)));
  typedef std::int32_t I32 __attribute__((vector_size(Isa::kBytes)));
  typedef std::uint16_t U16 __attribute__((vector_size(Isa::kBytes)));
  typedef std::uint16_t HalfU16 __attribute__((vector_size(Isa::kBytes / 2)));
  typedef float HalfF32 __attribute__((vector_size(Isa::kBytes / 2)));
  typedef std::uint32_t HalfU32 __attribute__((vector_size(Isa::kBytes / 2)));
};

}  // namespace arcmerge

#define ARCMERGE_FLATTEN __attribute__((flatten))
#define ARCMERGE_INLINE inline __attribute__((always_inline))
#define ARCMERGE_LAMBDA __attribute__((always_inline))

// The widest registers, in bits, for which variants are built. Clang compiles the functions that a variant calls with
// the instructions of the command line alone (-march), so only variants that all code may use are built with it. GCC
// compiles these functions with the instructions of the variant.
#if !defined(__x86_64__)
#define ARCMERGE_WIDEST 128
#elif !defined(__clang__) || defined(__AVX512F__)
#define ARCMERGE_WIDEST 512
#elif defined(__AVX2__)
#define ARCMERGE_WIDEST 256
#else
#define ARCMERGE_WIDEST 128
#endif

#if defined(__x86_64__)
#define ARCMERGE_AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define ARCMERGE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define ARCMERGE_AVX2 __attribute__((target("avx2,fma")))
#endif

#if ARCMERGE_WIDEST == 512

#define ARCMERGE_VARIANTS(Result, name, parameters, arguments)                                                 \
  namespace name##_variants {                                                                                  \
    ARCMERGE_FLATTEN ARCMERGE_AVX512BF16 static Result avx512bf16 parameters {                                 \
      return name##_body<Avx512Bf16> arguments;                                                                \
    }                                                                                                          \
    ARCMERGE_FLATTEN ARCMERGE_AVX512 static Result avx512 parameters { return name##_body<Avx512> arguments; } \
    ARCMERGE_FLATTEN ARCMERGE_AVX2 static Result avx2 parameters { return name##_body<Avx2> arguments; }       \
    ARCMERGE_FLATTEN static Result baseline parameters { return name##_body<Baseline> arguments; }             \
    constexpr decltype(&baseline) table[] = {avx512bf16, avx512, avx2, baseline};                              \
  }                                                                                                            \
  Result name parameters { return name##_variants::table[variant_index()] arguments; }

#elif ARCMERGE_WIDEST == 256

#define ARCMERGE_VARIANTS(Result, name, parameters, arguments)                                           \
  namespace name##_variants {                                                                            \
    ARCMERGE_FLATTEN ARCMERGE_AVX2 static Result avx2 parameters { return name##_body<Avx2> arguments; } \
    ARCMERGE_FLATTEN static Result baseline parameters { return name##_body<Baseline> arguments; }       \
    constexpr decltype(&baseline) table[] = {avx2, baseline};                                            \
  }                                                                                                      \
  Result name parameters { return name##_variants::table[variant_index()] arguments; }

#else

#define ARCMERGE_VARIANTS(Result, name, parameters, arguments) \
  ARCMERGE_FLATTEN Result name parameters { return name##_body<Baseline> arguments; }

#endif
