// Lanes of registers in any order.
#pragma once

namespace arcmerge {

// Lane i of the result is lane lanes[i] of x, or lane lanes[i] - n of y, of n lanes each. Clang has no builtin for
// lanes that are given in a register.
template <class U>
inline __attribute__((always_inline)) U shuffle(const U& x, const U& y, const U& lanes) {
#if defined(__clang__)
  constexpr int kLanes = sizeof(U) / sizeof(x[0]);
  U mixed;
  for (int i = 0; i < kLanes; ++i) mixed[i] = lanes[i] < kLanes ? x[lanes[i]] : y[lanes[i] - kLanes];
  return mixed;
#else
  return __builtin_shuffle(x, y, lanes);
#endif
}

}  // namespace arcmerge
