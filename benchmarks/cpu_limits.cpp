// What a core does at best: fused multiply-adds and exponentials on registers, and the loads and stores of short
// sequences without their arithmetic. Compiled with the flags of the instruction set that the kernels run on, so that
// vectors, and the exponential, are theirs.
#define VIDATTN_ISA limits
#include "call.h"
#include "tile.h"

#include <omp.h>

namespace {
using namespace vidattn::limits;
using FloatVec = Vec<float>;

// Hides from the compiler what a register holds, so that nothing is computed once for all turns of a loop or for
// several sums, or never.
template <class V>
VIDATTN_INLINE void hide(V& v) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#else
  asm volatile("" : "+x"(v));
#endif
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}

// Gives every thread an equal part of 0 .. count - 1. They are torch's own threads: others would have to share the
// cores with those, which go on looking for work for a while after a call.
template <class F>
void spread(int64_t count, int threads, F work) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_thread_num(), n = omp_get_num_threads();
    work(count * t / n, count * (t + 1) / n);
  }
}

// Independent sums: enough to hide the latency of 4 or 5 cycles on two ports, and few enough for the registers.
constexpr int kSums = sizeof(FloatVec) == 64 ? 24 : 12;
constexpr int kExponentials = 4;
}  // namespace

extern "C" {

// At least `flops` operations of multiply-adds in float32.
void fma32(int64_t flops, int threads) {
  const int64_t turns = flops / (2 * kLanes<float> * kSums);
  spread(turns, threads, [](int64_t begin, int64_t end) {
    FloatVec sums[kSums] = {};
#pragma GCC unroll 32
    for (int n = 0; n < kSums; ++n) hide(sums[n]);
    FloatVec factor = splat(0.999f), addend = splat(0.001f);
    hide(factor), hide(addend);
    for (int64_t i = begin; i < end; ++i) {
#pragma GCC unroll 32
      for (int n = 0; n < kSums; ++n) sums[n] = sums[n] * factor + addend;
    }
#pragma GCC unroll 32
    for (int n = 0; n < kSums; ++n) hide(sums[n]);
  });
}

// The same of pairs of bfloat16, where there are products of them; false where there are none.
bool fma_bf16(int64_t flops, int threads) {
#if defined(__AMX_BF16__)
  constexpr int kTileFlops = 2 * Bf16Tiles::kRows * 16 * 2 * Bf16Tiles::kWords;
  spread(flops / (4 * kTileFlops), threads, [](int64_t begin, int64_t end) {
    TileRegisters registers;
    for (int64_t i = begin; i < end; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  });
  return true;
#elif defined(__AVX512BF16__)
  const int64_t turns = flops / (4 * kLanes<float> * kSums);
  spread(turns, threads, [](int64_t begin, int64_t end) {
    __m512 sums[kSums] = {};
#pragma GCC unroll 32
    for (int n = 0; n < kSums; ++n) hide(sums[n]);
    __m512 pairs = _mm512_castsi512_ps(_mm512_set1_epi32(0x3a803a80));
    hide(pairs);
    for (int64_t i = begin; i < end; ++i) {
#pragma GCC unroll 32
      for (int n = 0; n < kSums; ++n) sums[n] = _mm512_dpbf16_ps(sums[n], (__m512bh)pairs, (__m512bh)pairs);
    }
#pragma GCC unroll 32
    for (int n = 0; n < kSums; ++n) hide(sums[n]);
  });
  return true;
#else
  return false;
#endif
}

// `count` exponentials in float32, as the kernels compute them; in 16 bits, as they compute what is rounded next.
void exponentials(int64_t count, int threads, bool half) {
  const int64_t turns = count / (kLanes<float> * kExponentials);
  spread(turns, threads, [half](int64_t begin, int64_t end) {
    auto run = [&](auto of) {
      for (int64_t i = begin; i < end; ++i) {
#pragma GCC unroll 8
        for (int n = 0; n < kExponentials; ++n) {
          FloatVec x = splat(-1.5f);
          hide(x);
          x = exp<decltype(of), float>(x);
          hide(x);
        }
      }
    };
    half ? run(ExpBf16()) : run(ExpFloat());
  });
}

// Reads and writes what attention over time does, in the order of the tokens: q, k, v in, context out; then, if
// `backward`, q, k, v and the context's gradient in, three gradients out. Rows are combined by "or".
//   qkv, gradients  (batch, tokens, 3, heads, row)
//   out, dout       (batch, tokens, heads, row)
// Sizes of a row are in words of 8 bytes.
void traffic(const uint64_t* qkv, const uint64_t* dout, uint64_t* out, uint64_t* gradients, int64_t batch,
             int64_t sites, int64_t frames, int64_t heads, int64_t row, bool time_fastest, bool backward, int threads) {
  const int64_t token = heads * row;
  spread(batch * sites, threads, [=](int64_t begin, int64_t end) {
    for (int pass = 0; pass <= int(backward); ++pass)
      for (int64_t group = begin; group < end; ++group) {
        const int64_t clip = group / sites * sites * frames, site = group % sites;
        for (int64_t t = 0; t < frames; ++t) {
          const int64_t place = clip + (time_fastest ? site * frames + t : t * sites + site);
          const uint64_t *q = qkv + 3 * place * token, *k = q + token, *v = k + token, *g = dout + place * token;
          uint64_t *o = out + place * token, *dq = gradients + 3 * place * token, *dk = dq + token, *dv = dk + token;
          if (pass == 0) {
#pragma GCC ivdep
            for (int64_t i = 0; i < token; ++i) o[i] = q[i] | k[i] | v[i];
          } else {
#pragma GCC ivdep
            for (int64_t i = 0; i < token; ++i) {
              dq[i] = q[i] | g[i];
              dk[i] = k[i] | g[i];
              dv[i] = v[i] | g[i];
            }
          }
        }
      }
  });
}

}  // extern "C"
