// The register tile that all products of the attention kernels run on, and the packed operands it reads.
//
// C (R rows, NV vectors) += A (R x steps) * B (steps x NV vectors). One element of A is broadcast at a time, straight
// from memory. Operands are made of words: one float32 or float64, or a pair of bfloat16 that are neighbours along the
// summed axis (two products an instruction).
#pragma once
#include "vec.h"

namespace vidattn {
namespace VIDATTN_ISA {

// How numbers are multiplied: the type of a value in a row, of an accumulator, of a packed word, and how many values a
// word holds along the summed axis. load_words takes a vector of words from a row of values of which n are left;
// column_words packs a vector of words along rows[0 .. pack), from value c on, of which n are left.
template <class T>
struct Plain {
  using Value = T;
  using Acc = T;
  using Word = T;
  using Exp = typename ExpOf<T>::type;
  static constexpr int pack = 1;
  static constexpr bool tiles = false;  // whether it computes on tile registers

  static VIDATTN_INLINE Vec<T> multiply_add(Word a, Vec<T> b, Vec<T> c) { return splat(a) * b + c; }
  static VIDATTN_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) { return a * b + c; }

  template <class In>
  static VIDATTN_INLINE Vec<T> load_words(const In* row, int64_t n) {
    return load_wide<T>(row, n);
  }
  static VIDATTN_INLINE Vec<T> column_words(const T* const* rows, int64_t c, int64_t n) {
    return load_first(rows[0] + c, n);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  using Value = bf16;
  using Acc = float;
  using Word = float;  // 32 bits that hold two bfloat16, the first in the low half; only ever copied
  using Exp = ExpBf16;
  static constexpr int pack = 2;
  static constexpr bool tiles = false;

  static VIDATTN_INLINE Vec<float> multiply_add(Word a, Vec<float> b, Vec<float> c) {
    return multiply_add(_mm512_set1_ps(a), b, c);
  }
  static VIDATTN_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  static VIDATTN_INLINE Vec<float> load_words(const bf16* row, int64_t n) {
    const __mmask32 valid = n >= 32 ? ~0u : (1u << (n < 0 ? 0 : n)) - 1;
    return (Vec<float>)_mm512_maskz_loadu_epi16(valid, row);
  }
  static VIDATTN_INLINE Vec<float> column_words(const bf16* const* rows, int64_t c, int64_t n) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), rows[0] + c));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), rows[1] + c));
    return (Vec<float>)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
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

#if defined(__AMX_BF16__)
// Pairs too, multiplied on tile registers: 16 rows of 16 words with 16 rows of 16 lanes in one instruction. C (16 rows,
// NV vectors) lies in registers 0 and 1.
struct Bf16Tiles : Bf16Pairs {
  static constexpr bool tiles = true;
  static constexpr int kRows = 16, kWords = 16;

  template <int NV>
  static VIDATTN_INLINE void clear() {
    __asm__ volatile("" ::: "memory");  // loads of tiles do not tell the compiler what they read
    _tile_zero(0);
    if constexpr (NV == 2) _tile_zero(1);
  }
  // As multiply_tile: rows of A are a_row words apart, and steps whole tiles.
  template <int NV>
  static VIDATTN_INLINE void multiply(const Word* a, int64_t a_row, const Word* b, int64_t b_step, int64_t steps) {
    for (int64_t s = 0; s < steps; s += kWords, a += kWords, b += kWords * b_step) {
      _tile_loadd(2, a, a_row * 4);
      _tile_loadd(3, b, b_step * 4);
      _tile_dpbf16ps(0, 2, 3);
      if constexpr (NV == 2) {
        _tile_loadd(4, b + kWords, b_step * 4);
        _tile_dpbf16ps(1, 2, 4);
      }
    }
  }
  template <int NV>
  static VIDATTN_INLINE void store_rows(float* to, int64_t step) {
    _tile_stored(0, to, step * 4);
    if constexpr (NV == 2) _tile_stored(1, to + kWords, step * 4);
  }
};

// Sets up the tile registers of this thread, and leaves them as they were.
class TileRegisters {
 public:
  TileRegisters() {
    Layout whole{};
    whole.palette = 1;
    for (int i = 0; i < 8; ++i) whole.row_bytes[i] = Bf16Tiles::kWords * 4, whole.rows[i] = Bf16Tiles::kRows;
    _tile_storeconfig(&before_);
    touch(&before_), touch(&whole);
    _tile_loadconfig(&whole);
  }
  ~TileRegisters() {
    touch(&before_);
    _tile_loadconfig(&before_);
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Layout {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  // The instructions tell the compiler of the first eight bytes alone.
  static VIDATTN_INLINE void touch(Layout* layout) { __asm__ volatile("" ::"r"(layout) : "memory"); }

  Layout before_;
};
#endif

// Registers that products need set up, while it lives.
template <class P>
struct Registers {};
#if defined(__AMX_BF16__)
template <>
struct Registers<Bf16Tiles> : TileRegisters {};
#endif

// Words of a row along the summed axis, of n values: products on tile registers take whole tiles.
template <class P>
constexpr int64_t words_of(int64_t n) {
  return P::tiles ? round_up(ceil_div(n, P::pack), 16) : ceil_div(n, P::pack);
}

// The n values of a row as words, up to a whole vector.
template <class P>
VIDATTN_INLINE void row_words(const typename P::Value* row, int64_t n, typename P::Word* to) {
  constexpr int step = kLanes<typename P::Word>;
  for (int64_t i = 0; i * P::pack < n; i += step) store(to + i, P::load_words(row + i * P::pack, n - i * P::pack));
}

// A[r, s] = a[r * RowStep + s * a_step]; B[s] = NV vectors at b + s * b_step.
template <class P, int R, int NV, int RowStep>
VIDATTN_INLINE void multiply_tile(const typename P::Word* a, int64_t a_step, const typename P::Word* b, int64_t b_step,
                                  int64_t steps, Vec<typename P::Acc> (&c)[R][NV]) {
  using Word = typename P::Word;
#pragma GCC unroll 4  // 8 per cent with AVX2
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

// to[word * to_step + lane] = word of rows[lane], for `lanes` rows (whole vectors of them) of n values.
template <class P>
VIDATTN_INLINE void transpose(const typename P::Value* const* rows, int64_t lanes, int64_t n, typename P::Word* to,
                              int64_t to_step) {
  using Word = typename P::Word;
  constexpr int L = kLanes<Word>;
  for (int64_t lane = 0; lane < lanes; lane += L)
    for (int64_t c = 0; c < n; c += L * P::pack) {
      Vec<Word> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = P::load_words(rows[lane + i] + c, n - c);
      exchange_rows<1, Word>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (c / P::pack + i < words_of<P>(n)) store(to + (c / P::pack + i) * to_step + lane, block[i]);
    }
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
