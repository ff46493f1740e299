// Tools of the native fuzzers: the bytes of an input as choices, memory of exactly the stated size, and checks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "gemma2.h"
#include "merge.h"

namespace fuzz {

using arcmerge::DType;
using Count = std::int64_t;

// The choices of an input. When its bytes are used up, every choice is the first one.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : next_(data), end_(data + size) {}

  std::uint8_t byte() { return next_ < end_ ? *next_++ : 0; }
  bool flag() { return byte() & 1; }
  Count below(Count limit) { return byte() % limit; }
  DType activation() { return flag() ? DType::f32 : DType::bf16; }
  DType dtype() { return DType(below(3)); }

  // A number up to `max`, mostly small, else near a size at which an operation starts another block.
  Count count(Count max) {
    constexpr Count kEdges[] = {128, 256, 384, 512, 1024, 2048, 4096, 8192};
    const std::uint8_t choice = byte();
    const Count large = kEdges[choice % std::size(kEdges)] + below(5) - 2;
    return std::min(max, choice < 208 ? choice % 70 : large);
  }

  // Bits that depend on the input.
  std::uint64_t random() {
    std::uint64_t bits = (state_ += 0x9e3779b97f4a7c15);  // splitmix64 (Steele et al. 2014)
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    return bits ^ bits >> 31;
  }
  void seed() { state_ = byte(); }

 private:
  const std::uint8_t *next_, *end_;
  std::uint64_t state_ = 0;
};

// `bytes` bytes, `shift` bytes past an aligned address; AddressSanitizer detects accesses after their end.
class Memory {
 public:
  explicit Memory(Count bytes, Count shift = 0, int filling = 0xa5)
      : bytes(bytes), memory_(new char[bytes + shift]), address(memory_.get() + shift) {
    std::memset(address, filling, bytes);
  }
  Memory(const Memory& other, Count shift) : Memory(other.bytes, shift) { std::memcpy(address, other.address, bytes); }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(address);
  }
  bool operator==(const Memory& other) const {
    return bytes == other.bytes && std::memcmp(address, other.address, bytes) == 0;
  }

  const Count bytes;

 private:
  std::unique_ptr<char[]> memory_;

 public:
  char* const address;
};

inline void require(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

// ---- conversions of single numbers

inline float value_of(const char* address, DType dtype, Count i) {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, address + 4 * i, 4);
    return value;
  }
  std::uint16_t half;
  std::memcpy(&half, address + 2 * i, 2);
  if (dtype == DType::f16) {
    _Float16 value;
    std::memcpy(&value, &half, 2);
    return float(value);
  }
  const std::uint32_t bits = std::uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest even; NaN becomes the quiet positive NaN.
inline void put_value(char* address, DType dtype, Count i, float value) {
  if (dtype == DType::f32) {
    const std::uint32_t nan = 0x7fc00000;
    std::memcpy(address + 4 * i, std::isnan(value) ? static_cast<const void*>(&nan) : &value, 4);
    return;
  }
  std::uint16_t half;
  if (dtype == DType::f16) {
    const auto rounded = _Float16(value);
    std::memcpy(&half, &rounded, 2);
    if (std::isnan(value)) half = 0x7e00;
  } else {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const std::uint32_t rest = bits & 0xffff, up = rest > 0x8000 || (rest == 0x8000 && (bits >> 16 & 1));
    half = std::isnan(value) ? 0x7fc0 : std::uint16_t((bits >> 16) + up);
  }
  std::memcpy(address + 2 * i, &half, 2);
}

inline float rounded(float value, DType dtype) {
  char bytes[4];
  put_value(bytes, dtype, 0, value);
  return value_of(bytes, dtype, 0);
}

// Numbers in [-1, 1), or any bits if `wild`.
inline Memory tensor(Input& in, Count count, DType dtype, bool wild, Count shift = 0) {
  Memory made(count * arcmerge::item_size(dtype), shift);
  in.seed();
  for (Count i = 0; i < count; ++i) {
    const std::uint64_t bits = in.random();
    if (wild && bits % 4)
      std::memcpy(made.address + i * arcmerge::item_size(dtype), &bits, arcmerge::item_size(dtype));
    else
      put_value(made.address, dtype, i, float(std::int32_t(bits >> 32)) * 0x1p-31f);
  }
  return made;
}

// Whether two sums are the same number, or both NaN.
inline bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : std::memcmp(&a, &b, sizeof a) == 0; }

inline bool close(double a, double b, double tolerance) { return std::fabs(a - b) <= tolerance; }

// Uses one thread or several, mostly as many as before, because starting threads takes longer than the work.
inline void use_threads(Input& in, bool several) {
  arcmerge::set_threads(!several ? 1 : in.byte() < 250 ? 3 : 2 + int(in.below(6)));
}

void use_any_variant(Input& in);
void merge_operation(Input& in);
void selection_operation(Input& in);
void model_operation(Input& in);
void attention_operation(Input& in);

}  // namespace fuzz
