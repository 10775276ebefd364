// Division by numbers that the host knows: a multiplication and a shift instead of some 20 to 100 instructions.
#pragma once
#include <primitives.cuh>

namespace vidattn::cuda {

class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : divisor_(uint32_t(divisor)) {
    while (int64_t(1) << shift_ < divisor) ++shift_;
    multiplier_ = uint32_t((((uint64_t(1) << shift_) - uint64_t(divisor)) << 32) / uint64_t(divisor) + 1);
  }

  __host__ __device__ __forceinline__ int divisor() const { return int(divisor_); }
  // Of a number from 0 to 2^31 - 1.
  __device__ __forceinline__ int quotient(int n) const {
    return int((__umulhi(uint32_t(n), multiplier_) + uint32_t(n)) >> shift_);
  }
  __device__ __forceinline__ int remainder(int n) const { return n - quotient(n) * int(divisor_); }
  // Gives the remainder, and leaves the quotient.
  __device__ __forceinline__ int split(int& n) const {
    const int quotient = this->quotient(n), remainder = n - quotient * int(divisor_);
    n = quotient;
    return remainder;
  }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;
};

}  // namespace vidattn::cuda
