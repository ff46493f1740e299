// 2^x and tanh(x) of registers of f32, for the softmax and the softcap. NaN stays NaN.
#pragma once

#include <initializer_list>

#include "cpu/simd/fma.h"

namespace arcmerge {

// 2^x for x <= 127, within 1 unit in the last place; 2^0 is exactly 1, and results below 2^-126 are 0.
// x = n + f with an integer n. 2^f is the minimax polynomial of degree 6 on |f| <= 1/2, with relative error 2^-29.
template <class Isa>
inline typename Vector<Isa>::F32 exp2(const typename Vector<Isa>::F32& x) {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  constexpr float kRound = 12582912;  // 1.5 * 2^23; the sum has n in its last bits
  const F32 shifted = x + kRound;
  const F32 f = x - (shifted - kRound);
  F32 series = F32{} + 1.5345810e-4f;
  for (const float coefficient : {1.3399931e-3f, 9.6184891e-3f, 5.5503286e-2f, 2.4022646e-1f, 6.9314718e-1f, 1.0f})
    series = Fma<Isa>::multiply_add(series, f, F32{} + coefficient);
  const F32 power = series * (F32)(((U32)shifted << 23) + 0x3f800000u);
  return x < -126 ? F32{} : power;
}

// tanh(x), within 3 units in the last place. (1 - e) / (1 + e) cancels near 0, where the odd polynomial of Cephes
// (Moshier 1992) is used instead.
template <class Isa>
inline typename Vector<Isa>::F32 tanh(const typename Vector<Isa>::F32& x) {
  using F32 = typename Vector<Isa>::F32;
  using U32 = typename Vector<Isa>::U32;
  const U32 sign = (U32)x & 0x80000000u;
  const F32 size = (F32)((U32)x ^ sign);
  const F32 e = exp2<Isa>(size * -2.8853900817779268f);  // exp(-2 |x|)
  const F32 far = (1 - e) / (1 + e);
  const F32 square = size * size;
  F32 series = F32{} - 5.70498872745e-3f;
  for (const float coefficient : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    series = Fma<Isa>::multiply_add(series, square, F32{} + coefficient);
  const F32 near = Fma<Isa>::multiply_add(size * square, series, size);
  return (F32)((U32)(size < 0.625f ? near : far) | sign);
}

}  // namespace arcmerge
