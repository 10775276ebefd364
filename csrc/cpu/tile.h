// The register tile that all products of the attention kernels run on, and the packed operands it reads.
//
// C (R rows, NV vectors) += A (R x steps) * B (steps x NV vectors). One element of A is broadcast at a time, straight
// from memory. Operands are made of words: one float32 or float64, or a pair of bfloat16 that are neighbours along the
// summed axis (two products an instruction).
#pragma once
#include "vec.h"

namespace vidattn {
namespace VIDATTN_ISA {

// How numbers are multiplied: the type of an accumulator, of a packed word, and how many values a word holds along the
// summed axis. row_words packs one row of n values along the row; column_words packs `pack` rows along the rows (a null
// row is zeros). Both fill up to `padded` words with zeros.
template <class T>
struct Plain {
  using Acc = T;
  using Word = T;
  using Exp = typename ExpOf<T>::type;
  static constexpr int pack = 1;

  static VIDATTN_INLINE Vec<T> multiply_add(Word a, Vec<T> b, Vec<T> c) { return splat(a) * b + c; }
  static VIDATTN_INLINE Vec<T> add_squares(Vec<T> words, Vec<T> c) { return words * words + c; }

  template <class In>
  static VIDATTN_INLINE void row_words(const In* row, int64_t n, int64_t padded, Word* to) {
    if (row) widen_row(row, to, n);
    for (int64_t i = row ? n : 0; i < padded; ++i) to[i] = 0;
  }
  template <class In>
  static VIDATTN_INLINE void column_words(const In* const* rows, int64_t n, int64_t padded, Word* to) {
    row_words(rows[0], n, padded, to);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  using Acc = float;
  using Word = float;  // 32 bits that hold two bfloat16, the first in the low half; only ever copied
  using Exp = ExpBf16;
  static constexpr int pack = 2;

  static VIDATTN_INLINE Vec<float> multiply_add(Word a, Vec<float> b, Vec<float> c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  }
  static VIDATTN_INLINE Vec<float> add_squares(Vec<float> words, Vec<float> c) {
    return _mm512_dpbf16_ps(c, (__m512bh)words, (__m512bh)words);
  }
  static VIDATTN_INLINE void row_words(const bf16* row, int64_t n, int64_t padded, Word* to) {
    for (int64_t i = 0; i < padded; i += 16) {
      const int64_t left = row ? n - 2 * i : 0;
      const __mmask32 valid = left >= 32 ? ~0u : (1u << (left > 0 ? left : 0)) - 1;
      _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(valid, row + (left > 0 ? 2 * i : 0)));
    }
  }
  static VIDATTN_INLINE void column_words(const bf16* const* rows, int64_t n, int64_t padded, Word* to) {
    for (int64_t i = 0; i < padded; i += 16) {
      const __mmask16 valid = n - i >= 16 ? 0xffff : (1u << (n > i ? n - i : 0)) - 1;
      const __m512i low =
          rows[0] ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, rows[0] + i)) : _mm512_setzero_si512();
      const __m512i high =
          rows[1] ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, rows[1] + i)) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
  // 32 neighbours of a row, rounded, as 16 words.
  static VIDATTN_INLINE Vec<float> narrow(Vec<float> first, Vec<float> second) {
    return (Vec<float>)_mm512_cvtne2ps_pbh(second, first);
  }
  // 16 lanes of two neighbouring rows, rounded, as 16 words.
  static VIDATTN_INLINE Vec<float> pair(Vec<float> row, Vec<float> next_row) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Vec<float>)_mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(next_row, row));
  }
};
#endif

// A[r, s] = a[r * RowStep + s * a_step]; B[s] = NV vectors at b + s * b_step.
template <class P, int R, int NV, int RowStep>
VIDATTN_INLINE void multiply_tile(const typename P::Word* a, int64_t a_step, const typename P::Word* b, int64_t b_step,
                                  int64_t steps, Vec<typename P::Acc> (&c)[R][NV]) {
  using Word = typename P::Word;
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += b_step) {
    Vec<Word> row[NV];
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) row[n] = load(b + n * kLanes<Word>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) c[r][n] = P::multiply_add(a[r * RowStep], row[n], c[r][n]);
  }
}

template <class V, int R, int NV>
VIDATTN_INLINE void clear(V (&c)[R][NV]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) c[r][n] = V{};
}

// to[s, lane] = from[lane, s] for `lanes` rows of `steps` words (whole vectors of them are read); lanes is a multiple
// of the vector.
template <class Word>
VIDATTN_INLINE void transpose(const Word* from, int64_t from_step, int64_t lanes, int64_t steps, Word* to) {
  constexpr int L = kLanes<Word>;
  for (int64_t lane = 0; lane < lanes; lane += L)
    for (int64_t s = 0; s < steps; s += L) {
      Vec<Word> rows[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) rows[i] = load(from + (lane + i) * from_step + s);
      exchange_rows<1, Word>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (s + i < steps) store(to + (s + i) * lanes + lane, rows[i]);
    }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// Hands out 64-byte aligned pieces of one buffer; with a null buffer it only adds up what is needed.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace VIDATTN_ISA
}  // namespace vidattn
