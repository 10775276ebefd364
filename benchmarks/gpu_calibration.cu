// Small kernels that each keep one unit of a GPU busy and nothing else. calibration.py builds them with nvcc as a
// shared library, calls run() and divides; the loops are checked in SASS for still holding what they claim to measure.

#include <cuda_runtime.h>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kThreads = 256;
constexpr int kSteps = 1024;  // iterations of every loop
constexpr int kChains = 8;    // independent operations in flight per thread

// What a kernel reads, writes and counts.
struct Buffers {
  const uint4* source;
  uint4* target;
  long long* clocks;  // per block: SM cycles and nanoseconds that its loop took
  long long bytes;    // of source
};

__device__ __forceinline__ long long cycles_now() {
  long long now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now));
  return now;
}

__device__ __forceinline__ long long nanoseconds() {
  long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Time of the code between construction and stop(), as the first thread of the block sees it.
struct Stopwatch {
  long long cycles, start;
  __device__ Stopwatch() : cycles(cycles_now()), start(nanoseconds()) {}
  __device__ void stop(long long* clocks) {
    __syncthreads();
    if (threadIdx.x == 0) {
      clocks[2 * blockIdx.x] = cycles_now() - cycles;
      clocks[2 * blockIdx.x + 1] = nanoseconds() - start;
    }
  }
};

__device__ __forceinline__ float element(const Buffers& buffers, int i) {
  return reinterpret_cast<const float*>(buffers.source)[(blockIdx.x * blockDim.x + threadIdx.x) * kChains + i];
}

// One float per thread in which all results meet, so that none is dead code.
__device__ __forceinline__ void keep(const Buffers& buffers, float value) {
  reinterpret_cast<float*>(buffers.target)[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

enum Operation { kExp2, kMaxMin, kPack, kFma };

// kChains * kSteps operations per thread.
template <Operation operation>
__global__ void __launch_bounds__(kThreads) arithmetic(Buffers buffers) {
  float x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = element(buffers, i);
  const float low = x[0] - 1.0f, high = x[0] + 1.0f;
  __syncthreads();
  Stopwatch watch;
#pragma unroll 1
  for (int step = 0; step < kSteps / 4; ++step) {
#pragma unroll
    for (int repeat = 0; repeat < 4; ++repeat) {
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
        if (operation == kExp2) {
          asm volatile("{.reg .f32 t; neg.f32 t, %0; ex2.approx.ftz.f32 %0, t;}" : "+f"(x[i]));
        } else if (operation == kMaxMin) {
          if (repeat % 2 == 0) {
            asm volatile("max.f32 %0, %0, %1;" : "+f"(x[i]) : "f"(low));
          } else {
            asm volatile("min.f32 %0, %0, %1;" : "+f"(x[i]) : "f"(high));
          }
        } else if (operation == kPack) {
          asm volatile("{.reg .b32 t; cvt.rn.bf16x2.f32 t, %0, %1; mov.b32 %0, t;}"
                       : "+f"(x[i])
                       : "f"(x[(i + 1) % kChains]));
        } else {
          asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(x[i]) : "f"(low), "f"(high));
        }
      }
    }
  }
  watch.stop(buffers.clocks);
  float sum = 0.0f;
  for (int i = 0; i < kChains; ++i) sum += x[i];
  keep(buffers, sum);
}

// kChains * kSteps products m16n8k16 of bfloat16 per warp, accumulated in float32.
__global__ void __launch_bounds__(kThreads) mma_sync(Buffers buffers) {
#if __CUDA_ARCH__ >= 800
  const uint4 a = buffers.source[2 * (blockIdx.x * blockDim.x + threadIdx.x)];
  const uint4 b = buffers.source[2 * (blockIdx.x * blockDim.x + threadIdx.x) + 1];
  float d[kChains][4] = {};
  Stopwatch watch;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
          " {%0, %1, %2, %3};"
          : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
          : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(i % 2 ? b.x : b.z), "r"(i % 2 ? b.y : b.w));
    }
  }
  watch.stop(buffers.clocks);
  float sum = 0.0f;
  for (int i = 0; i < kChains; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
  keep(buffers, sum);
#endif
}

#define FOUR(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define EIGHT(x, i) FOUR(x, i), FOUR(x, i + 4)

constexpr int kWgmmaRows = 64, kWgmmaColumns = 128, kWgmmaDepth = 64;  // a tile; four products of depth 16 each

// 4 * kSteps products m64n128k16 of bfloat16 per warpgroup, both operands in shared memory.
__global__ void __launch_bounds__(kThreads) wgmma(Buffers buffers) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kGroups = kThreads / 128;
  constexpr int kTile = 1024;  // a swizzled tile of 128-byte rows starts at a multiple of this
  __shared__ __align__(kTile) uint4 a[kGroups][kWgmmaRows * kWgmmaDepth / 8];
  __shared__ __align__(kTile) uint4 b[kWgmmaColumns * kWgmmaDepth / 8];
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(a) / 16); i += kThreads) a[0][i] = buffers.source[i];
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(b) / 16); i += kThreads) b[i] = buffers.source[4096 + i];
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  // Descriptor: address / 16, leading offset (unused), 1024 bytes from one group of 8 rows to the next, 128-byte
  // swizzle.
  const uint64_t layout = (1ull << 62) | (uint64_t{1024 >> 4} << 32) | (1ull << 16);
  const uint64_t first = layout | ((__cvta_generic_to_shared(a[threadIdx.x / 128]) & 0x3ffff) >> 4);
  const uint64_t second = layout | ((__cvta_generic_to_shared(b) & 0x3ffff) >> 4);
  float d[64] = {};
  Stopwatch watch;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // 16 elements of the depth are 32 bytes
      asm volatile(
          "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
          "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
          "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
          "}, %64, %65, 1, 1, 1, 0, 0;"
          : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24), EIGHT(d, 32), EIGHT(d, 40), EIGHT(d, 48), EIGHT(d, 56)
          : "l"(first + 2 * k), "l"(second + 2 * k));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  watch.stop(buffers.clocks);
  float sum = 0.0f;
  for (int i = 0; i < 64; ++i) sum += d[i];
  keep(buffers, sum);
#endif
}

// Who reads what in a warp: 32 adjacent floats, 32 adjacent pairs, or what a softmax tile reads of a bias that depends
// on the distance row - column: lane / 4 is the row, 2 * (lane % 4) the column of a pair, so lanes share addresses.
enum Pattern { kSingles, kPairs, kDistances };

// kChains * kSteps shared loads per warp.
template <Pattern pattern>
__global__ void __launch_bounds__(kThreads) shared_loads(Buffers buffers) {
  __shared__ __align__(16) float data[1024];
  for (int i = threadIdx.x; i < 1024; i += kThreads) data[i] = element(buffers, 0);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int first = pattern == kSingles ? lane
                    : pattern == kPairs ? 2 * lane
                                        : 2 * ((lane / 4 + 7 - 2 * (lane % 4)) / 2);
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(data + first));
  uint32_t low[kChains] = {}, high[kChains] = {};
  Stopwatch watch;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
      uint32_t x, y = 0;
      if (pattern == kSingles) {
        asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(x) : "r"(address + 256 * i));
      } else {
        asm volatile("ld.volatile.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(address + 256 * i));
      }
      low[i] ^= x;
      high[i] ^= y;
    }
  }
  watch.stop(buffers.clocks);
  uint32_t sum = 0;
  for (int i = 0; i < kChains; ++i) sum ^= low[i] ^ high[i];
  keep(buffers, __uint_as_float(sum));
}

// Every block reads all of source, from its own place on and past the L1 cache.
__global__ void __launch_bounds__(kThreads) l2_reads(Buffers buffers) {
  const unsigned count = static_cast<unsigned>(buffers.bytes / 16), blocks = gridDim.x;
  const unsigned start = static_cast<unsigned>(static_cast<unsigned long long>(count) * blockIdx.x / blocks);
  uint4 sum[4] = {};
  Stopwatch watch;
  for (unsigned i = threadIdx.x; i < count; i += 4 * kThreads) {
    uint4 value[4];
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
      const unsigned shifted = start + (i + j * kThreads < count ? i + j * kThreads : threadIdx.x);
      value[j] = __ldcg(buffers.source + (shifted < count ? shifted : shifted - count));
    }
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
      sum[j].x ^= value[j].x;
      sum[j].y ^= value[j].y;
      sum[j].z ^= value[j].z;
      sum[j].w ^= value[j].w;
    }
  }
  watch.stop(buffers.clocks);
  uint32_t all = 0;
  for (unsigned j = 0; j < 4; ++j) all ^= sum[j].x ^ sum[j].y ^ sum[j].z ^ sum[j].w;
  keep(buffers, __uint_as_float(all));
}

constexpr int kRun = 392;  // tokens of a window

// What attention moves: of each token of a window, the segments of one head in q, k and v, `segment` 16-byte words
// each, from rows of 3 * heads segments; one segment goes out, to rows of heads segments. Heads of a window are
// neighbours.
__global__ void __launch_bounds__(kThreads) segments(Buffers buffers, int heads, int segment) {
  const long long window = blockIdx.x / heads, head = blockIdx.x % heads;
  const long long first = window * kRun;
  const uint4* source = buffers.source + (first * 3 * heads + head) * segment;
  uint4* target = buffers.target + (first * heads + head) * segment;
#pragma unroll 4
  for (int i = threadIdx.x; i < kRun * segment; i += kThreads) {
    const int token = i / segment, word = i % segment;
    const uint4* row = source + token * 3 * heads * segment + word;
    const uint4 q = row[0], k = row[heads * segment], v = row[2 * heads * segment];
    target[token * heads * segment + word] =
        make_uint4(q.x ^ k.x ^ v.x, q.y ^ k.y ^ v.y, q.z ^ k.z ^ v.z, q.w ^ k.w ^ v.w);
  }
}

}  // namespace

// Runs a kernel by name, `repeats` times after two that do not count. Gives the time of the fastest, the mean time, and
// what one did: operations, FLOPs, warp loads or bytes. `clocks` needs 16 bytes a block. Returns "" or what went wrong.
extern "C" const char* run(const char* name, const void* source, long long source_bytes, void* target, void* clocks,
                           int blocks, int heads, int segment, int repeats, double* fastest, double* mean,
                           double* amount) {
  const Buffers buffers{static_cast<const uint4*>(source), static_cast<uint4*>(target), static_cast<long long*>(clocks),
                        source_bytes};
  void (*kernel)(Buffers) = nullptr;
  const double threads = static_cast<double>(blocks) * kThreads, steps = kSteps;
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("exp2")) kernel = arithmetic<kExp2>, *amount = threads * steps * kChains;
  if (is("max")) kernel = arithmetic<kMaxMin>, *amount = threads * steps * kChains;
  if (is("pack")) kernel = arithmetic<kPack>, *amount = threads * steps * kChains;
  if (is("fma")) kernel = arithmetic<kFma>, *amount = threads * steps * kChains;
  if (is("mma_sync")) kernel = mma_sync, *amount = threads / 32 * steps * kChains * 2 * 16 * 8 * 16;
  if (is("wgmma")) kernel = wgmma, *amount = threads / 128 * steps * 2.0 * kWgmmaRows * kWgmmaColumns * kWgmmaDepth;
  if (is("lds32")) kernel = shared_loads<kSingles>, *amount = threads / 32 * steps * kChains;
  if (is("lds64")) kernel = shared_loads<kPairs>, *amount = threads / 32 * steps * kChains;
  if (is("lds64_broadcast")) kernel = shared_loads<kDistances>, *amount = threads / 32 * steps * kChains;
  if (is("l2")) kernel = l2_reads, *amount = static_cast<double>(blocks) * source_bytes;
  const bool copies = is("segments");
  if (copies) *amount = 4.0 * 16 * segment * kRun * blocks;
  if (kernel == nullptr && !copies) return "no such kernel";

  cudaEvent_t start, stop;
  cudaError_t error = cudaEventCreate(&start);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaEventCreate(&stop);
  *fastest = *mean = 0.0;
  for (int repeat = -2; repeat < repeats && error == cudaSuccess; ++repeat) {
    cudaEventRecord(start);
    if (copies) {
      segments<<<blocks, kThreads>>>(buffers, heads, segment);
    } else {
      kernel<<<blocks, kThreads>>>(buffers);
    }
    error = cudaGetLastError();
    cudaEventRecord(stop);
    if (error == cudaSuccess) error = cudaEventSynchronize(stop);
    float milliseconds = 0.0f;
    if (error == cudaSuccess) error = cudaEventElapsedTime(&milliseconds, start, stop);
    if (repeat < 0) continue;
    const double seconds = milliseconds * 1e-3;
    if (repeat == 0 || seconds < *fastest) *fastest = seconds;
    *mean += seconds / repeats;
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
