// Sums of what the shares of a pass left behind, always in the same order.
#pragma once
#include <primitives.cuh>

namespace vidattn::cuda {

struct SumArguments {
  const float* parts;  // (shares, outer, inner)
  float* sum;          // element (o, i) lies at o * outer_stride + i * inner_stride
  int64_t shares, outer, inner, outer_stride, inner_stride;
};

constexpr int kSumThreads = 256, kSumColumns = 32;

// A block sums 32 columns: 8 threads a column take every 8th share, and one adds up what they have.
static __global__ void __launch_bounds__(kSumThreads) sum_shares(const __grid_constant__ SumArguments a) {
  const int column = threadIdx.x % kSumColumns, slice = threadIdx.x / kSumColumns;
  constexpr int kSlices = kSumThreads / kSumColumns;
  const int64_t size = a.outer * a.inner, at = int64_t(blockIdx.x) * kSumColumns + column;
  double sum = 0;
  if (at < size)
#pragma unroll 4
    for (int64_t share = slice; share < a.shares; share += kSlices) sum += a.parts[share * size + at];
  double* const sums = gpu::shared_memory<double>();
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0 || at >= size) return;
#pragma unroll
  for (int i = 1; i < kSlices; ++i) sum += sums[i * kSumColumns + column];
  a.sum[at / a.inner * a.outer_stride + at % a.inner * a.inner_stride] = float(sum);
}

inline const char* launch_sum(const SumArguments& a, void* stream) {
  const int64_t blocks = (a.outer * a.inner + kSumColumns - 1) / kSumColumns;
  return gpu::launch(sum_shares, dim3(uint32_t(blocks)), dim3(kSumThreads), kSumThreads * sizeof(double), stream, a);
}

}  // namespace vidattn::cuda
