// float16 for the emulator: storage, and conversions that round to nearest even.
#pragma once
#include <bit>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  return float(std::bit_cast<_Float16>(v.bits));
}
inline __half __float2half_rn(float f) {
  if (f != f) return {0x7fff};  // the GPU has one NaN
  return {std::bit_cast<uint16_t>(_Float16(f))};
}
