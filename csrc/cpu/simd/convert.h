// Conversions of single values between f32 and the 16-bit types, in integer arithmetic that every compiler vectorises.
//
// A conversion is exact if the value fits, and else rounds to nearest even, denormals included. It does not depend on
// the processor's denormal mode, as f32 denormals are far below the smallest f16. NaN becomes the quiet positive NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/variant.h"
#include "merge.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "arcmerge reads safetensors in place, which are little-endian; this processor is not"
#endif

namespace arcmerge {

constexpr std::uint32_t kInfinityBits = 0x7f800000;

ARCMERGE_INLINE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

ARCMERGE_INLINE float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ARCMERGE_INLINE bool is_nonfinite(std::uint32_t bits) { return (bits & kInfinityBits) == kInfinityBits; }

ARCMERGE_INLINE float from_bf16(std::uint16_t bits) { return float_of(std::uint32_t(bits) << 16); }

ARCMERGE_INLINE std::uint16_t to_bf16(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > kInfinityBits ? 0x7fc0 : rounded;
}

// f16 has 5 bits of exponent (bias 15) and 10 of mantissa; f32 has 8 (bias 127) and 23.
ARCMERGE_INLINE float from_f16(std::uint16_t bits) {
  const std::uint32_t magnitude = std::uint32_t(bits & 0x7fff) << 13;
  const std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16;
  const std::uint32_t normal = magnitude + ((127u - 15u) << 23);
  const std::uint32_t special = magnitude | kInfinityBits;
  // With the exponent of 2^-14, the denormal m * 2^-24 reads as 2^-14 + m * 2^-24. The subtraction is exact.
  const std::uint32_t denormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const std::uint32_t exponent = magnitude & 0x0f800000;
  return float_of((exponent == 0 ? denormal : exponent == 0x0f800000 ? special : normal) | sign);
}

ARCMERGE_INLINE std::uint16_t to_f16(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  const std::uint32_t sign = bits >> 16 & 0x8000;
  const std::uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // The last bit of 0.5 is 2^-24, as that of f16 denormals, so that adding 0.5 rounds to it.
  const std::uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const std::uint32_t finite = magnitude < (113u << 23) ? denormal : normal;
  const std::uint32_t infinite = magnitude < ((127u + 16u) << 23) ? finite : 0x7c00;
  return magnitude > kInfinityBits ? 0x7e00 : (infinite | sign);
}

ARCMERGE_INLINE float canonical(float value) { return value == value ? value : float_of(0x7fc00000); }

}  // namespace arcmerge
