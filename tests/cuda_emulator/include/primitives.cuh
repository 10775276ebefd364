// The emulator's side of csrc/cuda/primitives.cuh: the same names, chosen by the include path.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"

namespace gpu {

template <class T>
inline T* shared_memory() {
  return static_cast<T*>(emulator::shared_memory());
}
inline uint32_t shared_address(const void* p) {
  return emulator::shared_address(p);
}

inline uint32_t keep(uint32_t x) {
  return x;
}
inline const char* keep(const char* x) {
  return x;
}

template <class V>
inline V load_shared(uint32_t address, EMULATED_SITE) {
  V v;
  emulator::load_shared(address, &v, sizeof v, site);
  return v;
}

template <class V>
inline void store_shared(uint32_t address, V v, EMULATED_SITE) {
  emulator::store_shared(address, &v, sizeof v, site);
}

inline void cp_async_16(uint32_t shared, const void* source, bool valid, EMULATED_SITE) {
  emulator::async_copy(shared, source, 16, valid, site);
}
inline void cp_async_4(uint32_t shared, const void* source, bool valid, EMULATED_SITE) {
  emulator::async_copy(shared, source, 4, valid, site);
}
inline void cp_async_commit() {
  emulator::async_commit();
}
template <int kPending>
inline void cp_async_wait(EMULATED_SITE) {
  emulator::async_wait(kPending, site);
}

template <int kMatrices>
inline void ldmatrix(uint32_t (&r)[kMatrices], uint32_t row, EMULATED_SITE) {
  emulator::load_matrix(r, kMatrices, false, row, site);
}
template <int kMatrices>
inline void ldmatrix_transposed(uint32_t (&r)[kMatrices], uint32_t row, EMULATED_SITE) {
  emulator::load_matrix(r, kMatrices, true, row, site);
}

// A lane's two elements are in one column of two rows.
inline uint32_t transpose(uint32_t x, EMULATED_SITE) {
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  const uint32_t low = __shfl_sync(~0u, x, column * 4 + row / 2, 32, site);
  const uint32_t high = __shfl_sync(~0u, x, (column + 1) * 4 + row / 2, 32, site);
  return (low >> row % 2 * 16 & 0xffff) | high >> row % 2 * 16 << 16;
}

template <class T>
constexpr emulator::Element element_of = emulator::Element::float16;
template <>
constexpr emulator::Element element_of<__nv_bfloat16> = emulator::Element::bfloat16;

template <class T>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4],
                        EMULATED_SITE) {
  const uint32_t b[2] = {b0, b1};
  emulator::mma(16, element_of<T>, d, a, b, c, site);
}
template <class T>
inline void mma_16x8x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, const float (&c)[4], EMULATED_SITE) {
  const uint32_t a[2] = {a0, a1};
  emulator::mma(8, element_of<T>, d, a, &b0, c, site);
}

// ftz: numbers too small to be normal are taken and given as zeros.
inline float flush(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}
inline float exp2_approx(float x) {
  return flush(emulator::approximate(std::exp2(flush(x))));
}
inline float log2_approx(float x) {
  return flush(emulator::approximate(std::log2(flush(x))));
}

template <class T>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
}
template <>
inline uint32_t pack<__half>(float low, float high) {
  return __float2half_rn(low).bits | uint32_t(__float2half_rn(high).bits) << 16;
}

// Returns null, or what went wrong.
template <class... P, class... A>
inline const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void*, A&&... arguments) {
  return emulator::launch_kernel(kernel, grid, block, shared_bytes, std::forward<A>(arguments)...);
}

// So few that blocks have several tasks one after the other.
inline int multiprocessors() {
  return 2;
}
inline int shared_memory_limit() {
  return emulator::shared_memory_limit();
}

}  // namespace gpu
