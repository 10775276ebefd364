// Kernels with one mistake each, and one without: the emulator must find each mistake, and nothing else.
#include <primitives.cuh>

namespace {

constexpr int kThreads = 64;

enum Bug : int {
  kNone,
  kSharedReadOutside,
  kGlobalWriteOutside,
  kGlobalReadOutside,
  kGlobalReadMisaligned,
  kSharedReadMisaligned,
  kSharedReadUninitialised,
  kOutputReadUninitialised,
  kInputWritten,
  kOutputUnwritten,
  kTwoWrites,
  kTwoBlocksWrite,
  kBarrierMissing,
  kSyncwarpMissing,
  kBarrierMissingBeforeReuse,
  kBarrierInBranch,
  kBarriersDiffer,
  kMmaWithoutLane,
  kLanesInDifferentOperations,
  kOutsideOwnMask,
  kShuffleFromOutsideMask,
  kLaneHasLeft,
  kCopyMisaligned,
  kCopiesOverlap,
  kCopyReadEarly,
  kCopyWaitsForTooFew,
  kCopyOfAnotherLane,
  kCopyNotWaitedFor,
  kLdmatrixMisaligned,
  kLdmatrixOutside,
  kLocalIndex,
  kShiftTooFar,
  kAtomicsAndWrite,
  kBugs
};

template <int kBug>
__global__ void __launch_bounds__(kThreads) planted(const float* __restrict__ in, float* __restrict__ out, int n) {
  float* s = gpu::shared_memory<float>();  // 2 * kThreads
  const uint32_t address = gpu::shared_address(s);
  const int t = threadIdx.x, lane = t % 32;
  float value = in[t];
  if constexpr (kBug == kSharedReadOutside) value += s[t + 65 + kThreads];
  if constexpr (kBug == kGlobalWriteOutside) out[t + 2 * n] = 1.0f;
  if constexpr (kBug == kGlobalReadOutside) value += in[-1 - t];
  if constexpr (kBug == kGlobalReadMisaligned) value += reinterpret_cast<const float4*>(in + 1)[0].w;
  if constexpr (kBug == kSharedReadMisaligned) {
    static_cast<volatile float*>(s)[t] = value;
    __syncthreads();
    value += reinterpret_cast<const float2*>(s + 1)[t % 8].x;
  }
  if constexpr (kBug == kSharedReadUninitialised) value += s[t];
  if constexpr (kBug == kOutputReadUninitialised) value += out[t + blockIdx.x * kThreads];
  if constexpr (kBug == kInputWritten) const_cast<float*>(in)[t] = 0.0f;
  if constexpr (kBug == kTwoWrites) s[0] = value;
  if constexpr (kBug == kTwoBlocksWrite) {
    if (t == 0) out[0] = float(blockIdx.x);
  }
  if constexpr (kBug == kBarrierMissing) {
    s[t] = value;
    value += s[kThreads - 1 - t];
  }
  if constexpr (kBug == kSyncwarpMissing) {
    s[t] = value;
    value += s[t ^ 1];
  }
  if constexpr (kBug == kBarrierMissingBeforeReuse) {
    s[t] = value;
    __syncthreads();
    value += s[kThreads - 1 - t];
    s[t] = 0;
  }
  if constexpr (kBug == kBarrierInBranch) {
    if (t < 40) __syncthreads();
  }
  if constexpr (kBug == kBarriersDiffer) {
    if (lane < 16)
      __syncthreads();
    else
      __syncthreads();
  }
  if constexpr (kBug == kMmaWithoutLane) {
    float d[4] = {};
    const uint32_t a[4] = {};
    if (lane < 31) gpu::mma_16x8x16<__nv_bfloat16>(d, a, 0, 0, d);
    value += d[0];
  }
  if constexpr (kBug == kLanesInDifferentOperations) {
    if (lane & 1)
      value += __shfl_xor_sync(~0u, value, 1);
    else
      __syncwarp();
  }
  if constexpr (kBug == kOutsideOwnMask) value += __shfl_xor_sync(0xffff, value, 1);
  if constexpr (kBug == kShuffleFromOutsideMask) value += __shfl_sync(0xffffu << (lane & 16), value, 31 - lane);
  if constexpr (kBug == kLaneHasLeft) {
    if (t == 5) return;
    float d[4] = {};
    const uint32_t a[4] = {};
    gpu::mma_16x8x16<__half>(d, a, 0, 0, d);
    value += d[0];
  }
  if constexpr (kBug >= kCopyMisaligned && kBug <= kCopyNotWaitedFor) {
    const int slot = kBug == kCopiesOverlap ? lane : lane % 16 + t / 32 * 16;  // of 16 bytes
    if (lane < 16) gpu::cp_async_16(address + slot * 16, in + lane * 4 + (kBug == kCopyMisaligned), true);
    gpu::cp_async_commit();
    if constexpr (kBug == kCopyReadEarly) value += lane < 16 ? s[slot * 4] : 0;
    if constexpr (kBug != kCopyNotWaitedFor) gpu::cp_async_wait<kBug == kCopyWaitsForTooFew>();
    if constexpr (kBug == kCopyOfAnotherLane) value += lane < 16 ? s[slot * 4 ^ 4] : 0;
    if constexpr (kBug == kCopyWaitsForTooFew) {
      value += lane < 16 ? s[slot * 4] : 0;
      gpu::cp_async_wait<0>();
    }
  }
  if constexpr (kBug == kLdmatrixMisaligned || kBug == kLdmatrixOutside) {
    s[t] = s[t + kThreads] = value;
    __syncthreads();
    uint32_t r[4];
    gpu::ldmatrix(r, address + lane * (kBug == kLdmatrixOutside ? 32 : 8));
    value += float(r[0]);
  }
  if constexpr (kBug == kLocalIndex) {
    float local[4] = {value, 1, 2, 3};
    local[n % 30] = 2;  // 4
    value += local[t % 4];
  }
  if constexpr (kBug == kShiftTooFar) value += float(1 << (n - 32));
  if constexpr (kBug == kAtomicsAndWrite) {
    if (t == 40) s[0] = 2.0f;
    atomicAdd(&s[0], 1.0f);
  }
  if (kBug == kTwoBlocksWrite || (kBug == kOutputUnwritten && t == 9)) return;
  out[t + blockIdx.x * kThreads] = value;
}

// What is right of each kind.
__global__ void __launch_bounds__(kThreads) correct(const float* __restrict__ in, float* __restrict__ out, int) {
  float* s = gpu::shared_memory<float>();
  const uint32_t address = gpu::shared_address(s);
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  if (lane < 16) gpu::cp_async_16(address + lane * 16 + warp * 256, in + lane * 4, true);
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncthreads();
  float value = s[t];
  __syncthreads();
  s[t] = value;
  __syncwarp();
  value += s[t ^ 1] + __shfl_xor_sync(~0u, value, 16);
  __syncwarp();
  s[t ^ 1] = value;
  if (lane < 16)
    value += __shfl_xor_sync(0xffff, value, 1);
  else
    value += __shfl_xor_sync(0xffff0000, value, 2);
  if (__any_sync(~0u, value > 1e30f)) value = 0;
  __syncthreads();
  if (t == 0) s[0] = 0;
  __syncthreads();
  atomicAdd(&s[0], 1.0f);
  __syncthreads();
  value += s[0];
  __nv_bfloat16* halves = reinterpret_cast<__nv_bfloat16*>(s + kThreads);
  halves[t] = __float2bfloat16_rn(value);  // neighbours share a word
  __syncwarp();
  out[t + blockIdx.x * kThreads] = value + __bfloat162float(halves[t ^ 1]);
  if (lane == 7) return;
  __shfl_xor_sync(~(1u << 7), value, 8 * (lane != 15));
}

template <int... kEach>
const char* start(std::integer_sequence<int, kEach...>, int bug, const float* in, float* out, int n) {
  void (*kernel)(const float*, float*, int) = correct;
  ((bug == kEach && kEach != kNone && (kernel = planted<kEach>)), ...);
  return gpu::launch(kernel, dim3(2), dim3(kThreads), 2 * kThreads * sizeof(float), nullptr, in, out, n);
}

}  // namespace

extern "C" const char* planted_bug(const float* in, float* out, int bug) {
  return start(std::make_integer_sequence<int, kBugs>(), bug, in, out, kThreads);
}
