// Vectors of the instruction set that this file is compiled for, and the few operations that plain operators do not
// express.
//
// Every *_<isa>.cpp defines VIDATTN_ISA (a namespace name) and is compiled with its own flags. Nothing here may include
// a header with inline functions of external linkage: the linker keeps one copy of such a function, and it could be the
// one compiled for a newer CPU.
#pragma once
#include <stdint.h>

#include <utility>  // integer_sequence: types only

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#define VIDATTN_INLINE inline __attribute__((always_inline))

// glibc 2.29 has a log that differs from the older one in errno alone; with that one, the extension loads with 2.28.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver log, log@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver log, log@GLIBC_2.17");
#endif

namespace vidattn {
namespace VIDATTN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#if defined(__AMX_BF16__)
constexpr int kQueryRows = 16;  // of a tile register
#else
constexpr int kQueryRows =
    14;  // 14 x 2 accumulators + 2 key vectors of the 32 registers; the query rides along as an embedded broadcast
#endif
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kQueryRows = 6;  // 6 x 2 accumulators + 2 + 1 of the 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kQueryRows = 6;
#endif

template <class T>
struct VecTraits {
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = kVectorBytes / sizeof(T);
};
template <class T>
using Vec = typename VecTraits<T>::Vec;
template <class T>
constexpr int kLanes = VecTraits<T>::lanes;

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};
template <class T>
using Bits = typename BitsOf<T>::type;

template <class T>
VIDATTN_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x, for -0 and NaN too
}

template <class T>
VIDATTN_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecTraits<T>::Unaligned*>(p);
}

template <class T>
VIDATTN_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTraits<T>::Unaligned*>(p) = v;
}

// Writes past the caches, to an address that a vector divides. Whole cache lines of it are not read first.
template <class T>
VIDATTN_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128((__m128i*)p, (__m128i)v);
#else
  store(p, v);
#endif
}
// Lets other threads see what has been streamed.
VIDATTN_INLINE void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Lanes at and beyond n read as zero and are not touched in memory.
template <class T>
VIDATTN_INLINE Vec<T> load_first(const T* p, int64_t n) {
  if (n >= kLanes<T>) return load(p);
  Vec<T> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

template <class T>
VIDATTN_INLINE void store_first(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) return store(p, v);
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// All bits of the first n lanes.
template <class T, int... Lane>
VIDATTN_INLINE auto first_bits(int64_t n, std::integer_sequence<int, Lane...>) {
  typedef Bits<T> IntVec __attribute__((vector_size(kVectorBytes)));
  return IntVec{Lane...} < Bits<T>(n);
}
// Lanes at and beyond n become `other`.
template <class T>
VIDATTN_INLINE Vec<T> keep_first(Vec<T> v, int64_t n, T other) {
  return first_bits<T>(n, std::make_integer_sequence<int, kLanes<T>>()) ? v : splat(other);
}

// The larger of each pair; b where either is NaN (so that a NaN in b survives).
template <class T>
VIDATTN_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)
VIDATTN_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xffff : (1u << (n < 0 ? 0 : n)) - 1;
}
template <>
VIDATTN_INLINE Vec<float> max<float>(Vec<float> a, Vec<float> b) {
  return _mm512_max_ps(a, b);
}
template <>
VIDATTN_INLINE Vec<float> load_first<float>(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
template <>
VIDATTN_INLINE void store_first<float>(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), v);
}
template <>
VIDATTN_INLINE Vec<float> keep_first<float>(Vec<float> v, int64_t n, float other) {
  return _mm512_mask_blend_ps(first_lanes(n), _mm512_set1_ps(other), v);
}
#elif defined(__AVX2__)
template <>
VIDATTN_INLINE Vec<float> max<float>(Vec<float> a, Vec<float> b) {
  return _mm256_max_ps(a, b);
}
template <>
VIDATTN_INLINE Vec<float> load_first<float>(const float* p, int64_t n) {
  if (n >= 8) return load(p);
  return _mm256_maskload_ps(p, (__m256i)first_bits<float>(n, std::make_integer_sequence<int, 8>()));
}
#elif defined(__SSE2__)
template <>
VIDATTN_INLINE Vec<float> max<float>(Vec<float> a, Vec<float> b) {
  return _mm_max_ps(a, b);
}
#endif

template <int W, class T, int... Lane>
VIDATTN_INLINE Vec<T> swap_lanes(Vec<T> v, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(v, v, (Lane ^ W)...);
}
// Combines every run of Size neighbouring lanes by f; all lanes of the run get the result.
template <int Size, class T, class F, int W = Size / 2>
VIDATTN_INLINE Vec<T> reduce_runs(Vec<T> v, F f) {
  if constexpr (W > 0) {
    v = f(v, swap_lanes<W, T>(v, std::make_integer_sequence<int, kLanes<T>>()));
    return reduce_runs<Size, T, F, W / 2>(v, f);
  }
  return v;
}

template <class T>
VIDATTN_INLINE T sum(Vec<T> v) {
  return reduce_runs<kLanes<T>, T>(v, [](Vec<T> a, Vec<T> b) { return a + b; })[0];
}

template <class T>
VIDATTN_INLINE T largest(Vec<T> v) {
  return reduce_runs<kLanes<T>, T>(v, [](Vec<T> a, Vec<T> b) { return max<T>(a, b); })[0];
}

// One stage of a transposition: blocks of W x W lanes change places across the diagonal.
template <int W, class T, int... Lane>
VIDATTN_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, Lane...>) {
  constexpr int L = kLanes<T>;
  const Vec<T> top = __builtin_shufflevector(a, b, (Lane & W ? L + Lane - W : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & W ? L + Lane : Lane + W)...);
  a = top;
}
template <int W, class T>
VIDATTN_INLINE void exchange_rows(Vec<T>* rows) {
  if constexpr (W < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & W)) exchange<W, T>(rows[i], rows[i + W], std::make_integer_sequence<int, kLanes<T>>());
    exchange_rows<2 * W, T>(rows);
  }
}

VIDATTN_INLINE float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
VIDATTN_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

// x = m 2^e with m in [sqrt(1/2), sqrt(2)): log x = e log 2 + 2 atanh(t), t = (m - 1) / (m + 1). A call of the
// library's for every query row would cost 4 % of a bfloat16 forward pass.
VIDATTN_INLINE float log(float x) {
  if (!(x >= __FLT_MIN__ && x <= __FLT_MAX__)) return __builtin_logf(x);
  const int32_t bits = int32_t(float_to_bits(x)), e = (bits - 0x3f3504f3) >> 23;
  const float m = bits_to_float(uint32_t(bits - e * (1 << 23))), t = (m - 1) / (m + 1), u = t * t;
  const float series = u * (1.f / 3 + u * (1.f / 5 + u * (1.f / 7 + u * (1.f / 9))));
  return float(e) * 0.693147180559945f + 2 * (t + t * series);
}
VIDATTN_INLINE double log(double x) {
  return __builtin_log(x);
}

// e^x = 2^y for y <= 128 (1024): y = n + r with |r| <= 1/2, a polynomial in r, and 2^n written into the exponent.
// Adding `shifter` rounds y to the integer n and leaves n + bias in the low bits of the sum. y <= -bias gives exactly
// 0, NaN gives NaN. The float polynomials are minimax on [-1/2, 1/2]
// with the constant term fixed at 1.
struct ExpFloat {  // relative error 2e-9, so that rounding dominates: 0.7 ulp in all
  static constexpr float shifter = 12582912.f + 127.f, lowest = -127.f;  // 1.5 * 2^23 + bias
  static constexpr int mantissa = 23;
  static constexpr float c[] = {
      1.f, 0.69314718246f, 0.24022647738f, 0.05550332367f, 0.00961843692f, 0.00133988750f, 0.00015353362f};
};
// For results that are rounded to bfloat16 next: relative error 3e-6, three digits better than the rounding's.
struct ExpBf16 : ExpFloat {
  static constexpr float c[] = {1.f, 0.69312417507f, 0.24024099112f, 0.05590642616f, 0.00958285294f};
};
// Taylor's: relative error 4e-18.
struct ExpDouble {
  static constexpr double shifter = 6755399441055744.0 + 1023.0, lowest = -1023.0;  // 1.5 * 2^52 + bias
  static constexpr int mantissa = 52;
  static constexpr double c[] = {1.0,
                                 0.69314718055994530942,
                                 0.24022650695910071233,
                                 0.055504108664821579953,
                                 0.0096181291076284771620,
                                 0.0013333558146428443423,
                                 0.00015403530393381609954,
                                 0.000015252733804059840280,
                                 1.3215486790144309488e-6,
                                 1.0178086009239699728e-7,
                                 7.0549116208011233299e-9,
                                 4.4455382718708114976e-10,
                                 2.5678435993488205141e-11,
                                 1.3691488853904128881e-12};
};
template <class E, class T>
VIDATTN_INLINE Vec<T> exp(Vec<T> x) {
  typedef Bits<T> IntVec __attribute__((vector_size(kVectorBytes)));
  const Vec<T> y = max<T>(splat(E::lowest), x * T(1.44269504088896340736));
  const Vec<T> shifted = y + E::shifter;
  const Vec<T> r = y - (shifted - E::shifter);
  constexpr int degree = sizeof(E::c) / sizeof(T) - 1;
  Vec<T> p = splat(E::c[degree]);
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) p = p * r + E::c[i];
  return p * (Vec<T>)((IntVec)shifted << E::mantissa);
}
template <class T>
struct ExpOf;
template <>
struct ExpOf<float> {
  using type = ExpFloat;
};
template <>
struct ExpOf<double> {
  using type = ExpDouble;
};

// Storage types. The two 16-bit ones are plain bit patterns: conversions are exact upwards and round to nearest even
// downwards.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

VIDATTN_INLINE float widen(float x) {
  return x;
}
VIDATTN_INLINE double widen(double x) {
  return x;
}
VIDATTN_INLINE float widen(bf16 x) {
  return bits_to_float(uint32_t(x.bits) << 16);
}
VIDATTN_INLINE float widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinity, NaN
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 5192296858534827628530496329220096.f));
#endif
}

VIDATTN_INLINE void narrow(float x, float& y) {
  y = x;
}
VIDATTN_INLINE void narrow(double x, double& y) {
  y = x;
}
VIDATTN_INLINE void narrow(float x, bf16& y) {
  const uint32_t u = float_to_bits(x);
  y.bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
VIDATTN_INLINE void narrow(float x, f16& y) {
#if defined(__F16C__)
  y.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    y.bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
    y.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: adding 1/2 aligns the last kept bit with float's last bit
    y.bits = uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
  } else {
    y.bits = uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
#endif
}

// Consecutive values as one vector of the accumulator's type and back, rounded; only the first n lanes exist in memory,
// the others read as zero.
template <class T, class In>
VIDATTN_INLINE Vec<T> load_wide(const In* from, int64_t n) {
  if constexpr (sizeof(In) == sizeof(T)) {
    return load_first((const T*)from, n);
  } else {
    Vec<T> v{};
    if (n >= kLanes<T>) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<T>; ++i) v[i] = widen(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) v[i] = widen(from[i]);
    }
    return v;
  }
}
template <class T, class Out>
VIDATTN_INLINE void store_narrow(Out* to, Vec<T> v, int64_t n) {
  if constexpr (sizeof(Out) == sizeof(T)) {
    store_first((T*)to, v, n);
  } else {
    T row[kLanes<T>];
    store(row, v);
    for (int64_t i = 0; i < kLanes<T> && i < n; ++i) narrow(row[i], to[i]);
  }
}
#if defined(__AVX512F__)
template <>
VIDATTN_INLINE Vec<float> load_wide<float, bf16>(const bf16* from, int64_t n) {
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), from)), 16);
}
template <>
VIDATTN_INLINE Vec<float> load_wide<float, f16>(const f16* from, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), from));
}
template <>
VIDATTN_INLINE void store_narrow<float, f16>(f16* to, Vec<float> v, int64_t n) {
  _mm256_mask_storeu_epi16(to, first_lanes(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
template <>
VIDATTN_INLINE void store_narrow<float, bf16>(bf16* to, Vec<float> v, int64_t n) {
#if defined(__AVX512BF16__)
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i u = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i kept =
      _mm512_mask_mov_epi32(even, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  const __m256i rounded = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
  _mm256_mask_storeu_epi16(to, first_lanes(n), rounded);
}
#elif defined(__AVX2__)
template <>
VIDATTN_INLINE Vec<float> load_wide<float, bf16>(const bf16* from, int64_t n) {
  alignas(16) bf16 part[8] = {};
  if (n < 8) {
    for (int64_t i = 0; i < n; ++i) part[i] = from[i];
    from = part;
  }
  const __m256i words = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));  // in both halves
  constexpr char zero = -1;
  return (Vec<float>)_mm256_shuffle_epi8(
      words, _mm256_setr_epi8(zero, zero, 0, 1, zero, zero, 2, 3, zero, zero, 4, 5, zero, zero, 6, 7,  //
                              zero, zero, 8, 9, zero, zero, 10, 11, zero, zero, 12, 13, zero, zero, 14, 15));
}
template <>
VIDATTN_INLINE Vec<float> load_wide<float, f16>(const f16* from, int64_t n) {
  alignas(16) f16 part[8] = {};
  if (n < 8) {
    for (int64_t i = 0; i < n; ++i) part[i] = from[i];
    from = part;
  }
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
template <class Out>
VIDATTN_INLINE void store_first_words(Out* to, __m128i v, int64_t n) {
  if (n >= 8) return _mm_storeu_si128((__m128i*)to, v);
  alignas(16) Out part[8];
  _mm_store_si128((__m128i*)part, v);
  for (int64_t i = 0; i < n; ++i) to[i] = part[i];
}
template <>
VIDATTN_INLINE void store_narrow<float, f16>(f16* to, Vec<float> v, int64_t n) {
  store_first_words(to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), n);
}
template <>
VIDATTN_INLINE void store_narrow<float, bf16>(bf16* to, Vec<float> v, int64_t n) {
  const __m256i u = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i is_nan = (__m256i)_mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(even, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
  store_first_words(to, _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)), n);
}
#endif

}  // namespace VIDATTN_ISA
}  // namespace vidattn
