// philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the dropout mask of every
// backend.
#pragma once
#include <stdint.h>

#include "vec.h"

namespace vidattn {
namespace VIDATTN_ISA {

// Writes the four outputs for the counter (c0, c1, c2, c3) and the key (low, high half of the seed).
VIDATTN_INLINE void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t out[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53) * c0, p1 = uint64_t(0xCD9E8D57) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

struct Dropout {
  double p;
  uint64_t seed;

  // factor[0, count) = what the probabilities of query i and keys [first, first + count) are multiplied by; first and
  // count are multiples of 4.
  template <class T>
  void factors(int64_t first, int64_t count, int64_t i, int64_t head, int64_t group, T* factor) const {
    const T kept = T(1 / (1 - p));
    for (int64_t j = 0; j < count; j += 4) {
      uint32_t u[4];
      philox(seed, uint32_t((first + j) / 4), uint32_t(i), uint32_t(head), uint32_t(group), u);
      for (int lane = 0; lane < 4; ++lane) factor[j + lane] = (u[lane] >> 8) * 0x1p-24 >= p ? kept : T(0);
    }
  }
};

}  // namespace VIDATTN_ISA
}  // namespace vidattn
