// bfloat16 for the emulator: storage, and conversions that round to nearest even.
#pragma once
#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  return std::bit_cast<float>(uint32_t(v.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};  // the GPU has one NaN
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
