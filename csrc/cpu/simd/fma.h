// Fused multiply-add, for sums whose last bits may differ between variants.
#pragma once

#include <cstring>

#include "cpu/simd/variant.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arcmerge {

// a * b + c with one rounding. The baseline has no such instruction and rounds twice.
template <class Isa>
struct Fma {
  typedef typename Vector<Isa>::F32 F32;

  static inline F32 multiply_add(const F32& a, const F32& b, const F32& c) { return a * b + c; }
};

#if defined(__x86_64__)
template <>
struct Fma<Avx512> {
  typedef Vector<Avx512>::F32 F32;

  ARCMERGE_AVX512 static inline F32 multiply_add(const F32& a, const F32& b, const F32& c) {
    return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
};
template <>
struct Fma<Avx512Bf16> : Fma<Avx512> {};
template <>
struct Fma<Avx2> {
  typedef Vector<Avx2>::F32 F32;

  ARCMERGE_AVX2 static inline F32 multiply_add(const F32& a, const F32& b, const F32& c) {
    return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }
};
#endif

// A register with `value` in every lane. It is filled by integers because 0.0f + value would turn -0 into 0, and GCC 12
// has no better way to fill a register.
template <class Isa>
inline typename Vector<Isa>::F32 broadcast(float value) {
  using U32 = typename Vector<Isa>::U32;
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (typename Vector<Isa>::F32)(U32{} + bits);
}

}  // namespace arcmerge
