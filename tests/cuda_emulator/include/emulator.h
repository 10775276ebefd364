// The words of CUDA for a host compiler: `g++ -x c++ kernel.cu` with this folder first on the include path.
// Every CUDA thread is a fiber: it runs until it needs other threads, and goes on when they have come.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__ _Pragma("GCC error \"take shared memory from gpu::shared_memory<T>(): no other is checked\"")
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Aligned as on the GPU, where a misaligned access is an error.
#define EMULATED_VECTORS(T, name)                     \
  struct alignas(2 * sizeof(T)) name##2 {             \
    T x, y;                                           \
  };                                                  \
  struct alignas(4 * sizeof(T)) name##4 {             \
    T x, y, z, w;                                     \
  };                                                  \
  inline name##2 make_##name##2(T x, T y) {           \
    return {x, y};                                    \
  }                                                   \
  inline name##4 make_##name##4(T x, T y, T z, T w) { \
    return {x, y, z, w};                              \
  }
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
#undef EMULATED_VECTORS

namespace emulator {

struct Builtins {
  uint3 thread, block;
  dim3 grid, threads;
};
extern Builtins builtins;

using Site = const std::source_location&;  // where a primitive was called

enum class Element : uint32_t { bfloat16, float16 };
enum class Shuffle : uint32_t { index, exclusive_or };
enum class Combine : uint32_t { none, all };

// Operations of a warp: the caller waits until all lanes of `mask` have come.
void sync_warp(uint32_t mask, Site site);
void shuffle(Shuffle kind, uint32_t mask, void* value, size_t bytes, int operand, int width, Site site);
uint32_t vote(uint32_t mask, bool predicate, Site site);
void load_matrix(uint32_t* out, int matrices, bool transpose, uint32_t row, Site site);
void mma(int depth, Element element, float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site);

// Of a block: all its threads come.
int block_barrier(Combine combine, int value, Site site);

void load_shared(uint32_t address, void* to, size_t bytes, Site site);
void store_shared(uint32_t address, const void* from, size_t bytes, Site site);
void async_copy(uint32_t shared, const void* source, int bytes, bool valid, Site site);
void async_commit();
void async_wait(int pending, Site site);

void* shared_memory();
uint32_t shared_address(const void* pointer);
int shared_memory_limit();
void atomic_begin(void* address, int bytes, Site site);  // no other fiber runs before the caller's next call
float approximate(float exact);                          // off by as much as the hardware may be, if that is asked for

using Entry = void (*)(void*);
const char* launch(Entry entry, void* arguments, size_t argument_bytes, dim3 grid, dim3 block, size_t shared_bytes);

template <class... Parameters, class... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  };
  Call call{kernel, {std::forward<Arguments>(arguments)...}};
  const Entry entry = [](void* p) {
    Call* c = static_cast<Call*>(p);
    std::apply(c->kernel, c->arguments);
  };
  return launch(entry, &call, sizeof call, grid, block, shared_bytes);
}

}  // namespace emulator

#define threadIdx (emulator::builtins.thread)
#define blockIdx (emulator::builtins.block)
#define gridDim (emulator::builtins.grid)
#define blockDim (emulator::builtins.threads)

// A primitive's last parameter. Its default is the place of the call.
#define EMULATED_SITE emulator::Site site = std::source_location::current()

inline void __syncthreads(EMULATED_SITE) {
  emulator::block_barrier(emulator::Combine::none, 0, site);
}
inline int __syncthreads_and(int p, EMULATED_SITE) {
  return emulator::block_barrier(emulator::Combine::all, p != 0, site);
}
inline void __syncwarp(unsigned mask = ~0u, EMULATED_SITE) {
  emulator::sync_warp(mask, site);
}

namespace emulator {
template <class T>
inline T shuffled(Shuffle kind, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  shuffle(kind, mask, &value, sizeof(T), operand, width, site);
  return value;
}
}  // namespace emulator
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATED_SITE) {
  return emulator::shuffled(emulator::Shuffle::index, mask, value, lane, width, site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATED_SITE) {
  return emulator::shuffled(emulator::Shuffle::exclusive_or, mask, value, bits, width, site);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMULATED_SITE) {
  return emulator::vote(mask, p != 0, site);
}
inline int __any_sync(unsigned mask, int p, EMULATED_SITE) {
  return emulator::vote(mask, p != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int p, EMULATED_SITE) {
  return emulator::vote(mask, p == 0, site) == 0;
}

namespace emulator {
// Without the compiler's hooks, which would take the two halves for plain accesses.
template <class T, class F>
__attribute__((no_sanitize("thread"), noinline)) T atomic(T* p, F change, Site site) {
  atomic_begin(p, sizeof(T), site);
  const T old = *p;
  *p = change(old);
  return old;
}
}  // namespace emulator
template <class T>
inline T atomicAdd(T* p, T v, EMULATED_SITE) {
  return emulator::atomic(p, [v](T old) { return T(old + v); }, site);
}

inline float __fdividef(float a, float b) {
  return a / b;
}
inline int __ffs(int x) {
  return x ? std::countr_zero(unsigned(x)) + 1 : 0;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned((uint64_t(a) * b) >> 32);
}
inline float __uint_as_float(unsigned u) {
  return std::bit_cast<float>(u);
}
inline unsigned __float_as_uint(float f) {
  return std::bit_cast<unsigned>(f);
}
inline float __int_as_float(int u) {
  return std::bit_cast<float>(u);
}
inline int __float_as_int(float f) {
  return std::bit_cast<int>(f);
}
using std::max;
using std::min;
