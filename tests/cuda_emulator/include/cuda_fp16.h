// float16 for the emulator: storage, and conversions that round to nearest even.
#pragma once
#include <bit>
#include <cstdint>

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;

inline float __half2float(__half v) {
  return float(std::bit_cast<_Float16>(v.bits));
}
inline __half __float2half_rn(float f) {
  if (f != f) return {0x7fff};  // the GPU has one NaN
  return {std::bit_cast<uint16_t>(_Float16(f))};
}
inline __half __float2half(float f) {
  return __float2half_rn(f);
}
inline __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
