// What every primitive gives on raw words. The same kernel runs on the emulator and on a GPU, and the results are
// compared (conformance.py says how closely).
#include <primitives.cuh>

namespace {

constexpr int kCases = 17, kWords = 8;  // out[case][lane][word]

__device__ __forceinline__ void store(uint32_t* out, int which, const uint32_t (&v)[kWords]) {
  for (int i = 0; i < kWords; ++i) out[(which * 32 + threadIdx.x) * kWords + i] = v[i];
}

// Integers whose sums are exact, or numbers of many sizes, whose sums are rounded.
__device__ __forceinline__ float small(uint32_t word, bool integers) {
  return integers ? float(int(word % 16) - 8)
                  : float(int(word % 4096) - 2048) / 65536.0f * float(1 << word / 4096 % 16);
}

// Products of both depths, and the words of a and b that they were made of.
template <class T>
__device__ __forceinline__ void products(const uint32_t* in, uint32_t* out, int which, bool integers) {
  const uint32_t* mine = in + threadIdx.x * 16;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = gpu::pack<T>(small(mine[2 * i], integers), small(mine[2 * i + 1], integers));
  for (int i = 0; i < 2; ++i) b[i] = gpu::pack<T>(small(mine[8 + 2 * i], integers), small(mine[9 + 2 * i], integers));
  float c[4], d[4], e[4];
  for (int i = 0; i < 4; ++i) c[i] = small(mine[12 + i], integers);
  gpu::mma_16x8x16<T>(d, a, b[0], b[1], c);
  gpu::mma_16x8x8<T>(e, a[0], a[1], b[0], c);
  uint32_t r[kWords];
  for (int i = 0; i < 4; ++i) r[i] = __float_as_uint(d[i]), r[4 + i] = __float_as_uint(e[i]);
  store(out, which, r);
  for (int i = 0; i < 4; ++i) r[i] = a[i], r[4 + i] = i < 2 ? b[i] : 0;
  store(out, which + 1, r);
}

__global__ void __launch_bounds__(32) conformance(const uint32_t* __restrict__ in, uint32_t* __restrict__ out) {
  uint32_t* s = gpu::shared_memory<uint32_t>();  // 256 words
  const uint32_t address = gpu::shared_address(s);
  const int t = threadIdx.x;
  for (int i = t; i < 256; i += 32) s[i] = in[i];
  __syncwarp();
  const uint32_t row = address + (t * 5 % 32) * 32 + (t & 1) * 16;
  uint32_t x2[2], x4[4], y2[2], y4[4];
  gpu::ldmatrix(x2, row), gpu::ldmatrix(x4, row);
  gpu::ldmatrix_transposed(y2, row), gpu::ldmatrix_transposed(y4, row);
  store(out, 0, {x2[0], x2[1], x4[0], x4[1], x4[2], x4[3], 0, 0});
  store(out, 1, {y2[0], y2[1], y4[0], y4[1], y4[2], y4[3], 0, 0});

  const uint32_t v = in[t];
  store(out, 2,
        {__shfl_sync(~0u, v, 5), __shfl_sync(~0u, v, t * 7), __shfl_xor_sync(~0u, v, 9), __shfl_sync(~0u, v, t + 3, 8),
         __shfl_xor_sync(~0u, v, 20, 16), 0, 0, 0});
  store(out, 3,
        {__ballot_sync(~0u, v & 1), uint32_t(__any_sync(~0u, v == in[3])), uint32_t(__all_sync(~0u, v != in[3])),
         __umulhi(v, in[t + 3]), uint32_t(__ffs(int(v))), 0, 0, 0});
  const float f = float(int(v % 4096) - 2048) / 64.0f;
  store(
      out, 4,
      {gpu::pack<__nv_bfloat16>(f, -f * 1.001f), gpu::pack<__half>(f * 1.003f, f * 1e-6f),
       gpu::pack<__half>(f * 1e5f, 1e-8f),
       gpu::pack<__nv_bfloat16>(__uint_as_float(0x7fffffff), __uint_as_float(0x7f800000)),
       gpu::pack<__nv_bfloat16>(__uint_as_float(v), 3.4e38f), gpu::pack<__half>(__uint_as_float(0x7fc00001), 65520.0f),
       uint32_t(__syncthreads_and(v != in[3])), uint32_t(__syncthreads_and(t < 32))});

  const float2 floats = gpu::load_shared<float2>(address + t * 8);
  const int2 ints = gpu::load_shared<int2>(address + (t ^ 5) * 8);
  store(out, 15,
        {__float_as_uint(floats.x), __float_as_uint(floats.y), uint32_t(ints.x), uint32_t(ints.y),
         __float_as_uint(gpu::load_shared<float>(address + t * 28)),
         gpu::load_shared<uint32_t>(gpu::keep(address + t * 12) + 4), 0, 0});

  __syncthreads();
  gpu::cp_async_16(address + t * 16, in + 256 + t * 4, t % 3 != 0);
  gpu::cp_async_commit();
  gpu::cp_async_4(address + 512 + t * 4, in + 512 + t, t % 5 != 0);
  gpu::cp_async_commit();
  gpu::cp_async_wait<1>();
  const uint32_t early = s[t * 4 + 1];
  gpu::cp_async_wait<0>();
  __syncwarp();
  store(out, 5, {early, s[(t ^ 1) * 4], s[128 + (t ^ 1)], s[(t ^ 2) * 4 + 3], 0, 0, 0, 0});

  store(out, 6,
        {__float_as_uint(gpu::exp2_approx(f)), __float_as_uint(gpu::exp2_approx(-f * 4)),
         __float_as_uint(gpu::exp2_approx(-f * 40)), __float_as_uint(gpu::exp2_approx(__uint_as_float(0xff800000))),
         __float_as_uint(gpu::log2_approx(f * f + 2)), __float_as_uint(gpu::log2_approx(0.0f)), 0, 0});
  __syncwarp();
  gpu::store_shared(address + t * 4, v);
  gpu::store_shared(address + 256 + t * 8, make_float2(f, -f));
  __syncwarp();
  const float4 four = gpu::load_shared<float4>(address + 256 + t / 2 * 16);
  const uint4 words = gpu::load_shared<uint4>(address + t % 8 * 16);
  store(out, 16,
        {gpu::transpose(v), __float_as_uint(four.x), __float_as_uint(four.w), words.x, words.y, words.z, words.w, 0});

  products<__nv_bfloat16>(in, out, 7, true);
  products<__half>(in, out, 9, true);
  products<__nv_bfloat16>(in, out, 11, false);
  products<__half>(in, out, 13, false);
}

}  // namespace

extern "C" const char* conformance_launch(const uint32_t* in, uint32_t* out) {
  return gpu::launch(conformance, dim3(1), dim3(32), 1024, nullptr, in, out);
}
