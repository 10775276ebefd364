// Everything the kernels say to the hardware that C++ has no word for: the only inline PTX of the project. The tests
// put another file of this name first on the include path, which says the same to an emulated GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <utility>

namespace gpu {

// The dynamic shared memory of the block.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Gives x back, and keeps the compiler from taking apart the sum that it is: loads at constant distances from one
// address then need no additions.
__device__ __forceinline__ const char* keep(const char* x) {
  asm volatile("" : "+l"(x));
  return x;
}
__device__ __forceinline__ uint32_t keep(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Reads of shared memory by address: V is float, float2, float4, int2, uint4 or uint32_t.
template <class V>
__device__ __forceinline__ V load_shared(uint32_t address);
template <>
__device__ __forceinline__ float load_shared<float>(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
  return v;
}
template <>
__device__ __forceinline__ float2 load_shared<float2>(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}
template <>
__device__ __forceinline__ float4 load_shared<float4>(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
  return v;
}
template <>
__device__ __forceinline__ uint4 load_shared<uint4>(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
template <>
__device__ __forceinline__ int2 load_shared<int2>(uint32_t address) {
  int2 v;
  asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
template <>
__device__ __forceinline__ uint32_t load_shared<uint32_t>(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

// Writes to shared memory by address.
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Asynchronous copies from global to shared memory. valid = false writes zeros and does not read the source.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(source)),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(source)),
               "r"(valid ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Matrices of 8 x 8 elements of 16 bits; lane i gives the address of row i % 8 of matrix i / 8.
#define VIDATTN_LDMATRIX(name, suffix)                                                        \
  __device__ __forceinline__ void name(uint32_t (&r)[2], uint32_t row) {                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" suffix ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(r[0]), "=r"(r[1])                                                     \
                 : "r"(row)                                                                   \
                 : "memory");                                                                 \
  }                                                                                           \
  __device__ __forceinline__ void name(uint32_t (&r)[4], uint32_t row) {                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" suffix ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                             \
                 : "r"(row)                                                                   \
                 : "memory");                                                                 \
  }
VIDATTN_LDMATRIX(ldmatrix, "")
VIDATTN_LDMATRIX(ldmatrix_transposed, ".trans")
#undef VIDATTN_LDMATRIX

// Transposes an 8 x 8 matrix of 16-bit elements, of which a lane has two neighbours: row lane / 4, column lane % 4 * 2.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// d = a b + c for a (16, 16), b (16, 8), c and d (16, 8); the second form has 8 columns of a, 8 rows of b.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                            const float (&c)[4]);
template <class T>
__device__ __forceinline__ void mma_16x8x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, const float (&c)[4]);
#define VIDATTN_MMA(T, name)                                                                                      \
  template <>                                                                                                     \
  __device__ __forceinline__ void mma_16x8x16<T>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, \
                                                 const float (&c)[4]) {                                           \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                           \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                                 \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                   "f"(c[3]));                                                                                    \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ __forceinline__ void mma_16x8x8<T>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0,             \
                                                const float (&c)[4]) {                                            \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." name "." name                                            \
                 ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"                                             \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                 \
                 : "r"(a0), "r"(a1), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));                        \
  }
VIDATTN_MMA(__nv_bfloat16, "bf16")
VIDATTN_MMA(__half, "f16")
#undef VIDATTN_MMA

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats, rounded to nearest even, in one word.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// Returns null, or what went wrong.
template <class... P, class... A>
inline const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                          A&&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)  // every time: the attribute belongs to the current device
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // the next call must not find this one's error
  return cudaGetErrorString(error);
}

// Multiprocessors of the current device; 0 if that cannot be told.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return count;
}

// Shared memory that a block may have on the current device, in bytes; 0 if that cannot be told.
inline int shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return bytes;
}

}  // namespace gpu
