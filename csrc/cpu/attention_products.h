// What the forward and the backward pass share: the packing of rows and the products with them.
#pragma once
#include "attention.h"

namespace vidattn {
namespace VIDATTN_ISA {

// [tile][step][key in lane]: the operand of products summed over head_dim.
template <class P>
void Attention<P>::pack_in_lanes(const Group<P>& group, Slot slot, Word* to) const {
  for (int64_t tile = 0; tile < tiles_; ++tile, to += kWidth * steps_) {
    const Value* rows[kWidth];
    const int64_t left = n_ - tile * kWidth, count = left < kWidth ? left : kWidth;
    group.read(slot, tile * kWidth, count, rows, spare_);
    for (int64_t lane = count; lane < kWidth; ++lane) rows[lane] = (const Value*)kZeros;
    transpose<P>(rows, left > kLanes<T> ? kWidth : kLanes<T>, d_, to, kWidth);
  }
}

// Packs rows, of which one more is zeros, from number `first` on of an operand that has `of` of them.
template <class P>
VIDATTN_INLINE void Attention<P>::row_columns(const Value* const* rows, int64_t count, int64_t first, int64_t of,
                                              Word* to) const {
  for_each_column([&](int64_t c, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    Word* column = in_column(to, c, of) + first / P::pack * NV * kLanes<Word>;
    for (int64_t j = 0; j < count; j += P::pack)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n, column += kLanes<Word>)
        store(column, P::column_words(rows + j, c + n * kLanes<Word>, d_ - c - n * kLanes<Word>));
  });
}

// [column][key][channel of the column]: the operand of products summed over the keys.
template <class P>
void Attention<P>::pack_in_rows(const Group<P>& group, Slot slot, Word* to) const {
  for (int64_t first = 0; first < n_; first += kWidth) {
    const Value* rows[kWidth + 1];
    const int64_t count = n_ - first < kWidth ? n_ - first : kWidth, padded = P::tiles ? kWidth : count;
    group.read(slot, first, count, rows, spare_);
    for (int64_t row = count; row <= padded; ++row) rows[row] = (const Value*)kZeros;
    row_columns(rows, padded, first, tiles_ * kWidth, to);
  }
}

// Rows [first, first + count) of queries, zeros up to `padded` of them: as words, and if asked for packed in rows.
template <class P>
void Attention<P>::load_rows(const Group<P>& group, Slot slot, int64_t first, int64_t count, int64_t padded, Word* to,
                             Word* in_rows) const {
  const Value* rows[kRows + 1];
  group.read(slot, first, count, rows, spare_);
  for (int64_t r = count; r <= padded; ++r) rows[r] = (const Value*)kZeros;
  for (int64_t r = 0; r < padded; ++r) row_words<P>(rows[r], d_, to + r * kMaxDim);
  if (in_rows) row_columns(rows, count, 0, kRows, in_rows);
}

// Asks the family about the queries that come next, once their rows are loaded.
template <class P>
void Attention<P>::start_block(Group<P>& group, int64_t first, int64_t count, int64_t padded) {
  group.describe(first, count, queries_);
  for (int64_t r = count; r < padded; ++r) queries_[r] = queries_[0];
  range_ = {0, tiles_, nullptr};
  group.choose_tiles(first, count, range_);
}

template <class P>
typename P::Acc Attention<P>::longest_query(int64_t count) const {
  T longest = 0, total = 0;
  for (int64_t r = 0; r < count; ++r) {
    Vec<T> squares{};
    for (int64_t s = 0; s < steps_; s += kLanes<Word>) squares = add_squares(load(q_ + r * kMaxDim + s), squares);
    const T length = sum<T>(squares);
    longest = length > longest ? length : longest;
    total += length;
  }
  return longest + 0 * total;
}

template <class P>
typename P::Acc Attention<P>::longest_key() const {
  Vec<T> longest{}, total{};
  for (int64_t key = 0; key < n_; key += kLanes<T>) {
    Vec<T> squares{};
    const Word* keys = keys_in_lanes_ + key / kWidth * kWidth * steps_ + key % kWidth;
    for (int64_t s = 0; s < steps_; ++s) squares = add_squares(load(keys + s * kWidth), squares);
    longest = max<T>(longest, squares);
    total += squares;
  }
  return largest<T>(longest) + 0 * sum<T>(total);
}

// Products of rows [r, r + R) with the keys of a tile, summed over head_dim. With `top` they become scores, -inf beyond
// the last key, and their maxima are kept there; those of tile registers do so in finish_row.
template <class P>
template <int R, int NV>
__attribute__((noinline)) void Attention<P>::multiply_rows(const Word* rows, const Word* lanes, int64_t r, int64_t tile,
                                                           T* panels, Vec<T>* top) const {
  if constexpr (P::tiles) {
    P::template clear<NV>();
    P::template multiply<NV>(rows + r * kMaxDim, kMaxDim, lanes + tile * kWidth * steps_, kWidth, steps_);
    P::template store_rows<NV>(panel(panels, tile, r), kWidth);
    return;
  }
  Vec<T> s[R][NV];
  clear(s);
  multiply_tile<P, R, NV, kMaxDim>(rows + r * kMaxDim, 1, lanes + tile * kWidth * steps_, kWidth, steps_, s);
  if (top) {
    finish_scores<R, NV>(r, tile, s);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) top[r + i] = max<T>(top[r + i], s[i][n]);
  }
  T* to = panel(panels, tile, r);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) store(to + i * kWidth + n * kLanes<T>, s[i][n]);
}

// Makes scores of the products of a row with all tiles, as they lie in the panels, and gives their maxima.
template <class P>
VIDATTN_INLINE Vec<typename P::Acc> Attention<P>::finish_row(int64_t r) const {
  Vec<T> top = splat(-kInfinity);
  for_each_tile([&](int64_t tile, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    T* to = panel(scores_, tile, r);
    Vec<T> s[1][NV];
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) s[0][n] = load(to + n * kLanes<T>);
    finish_scores<1, NV>(r, tile, s);
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) {
      top = max<T>(top, s[0][n]);
      store(to + n * kLanes<T>, s[0][n]);
    }
  });
  return top;
}

// The bias comes last, not as the start of the sums: a large one would round every partial sum.
template <class P>
template <int R, int NV>
VIDATTN_INLINE void Attention<P>::finish_scores(int64_t r, int64_t tile, Vec<T> (&s)[R][NV]) const {
  const Query<T>* q = queries_ + r;
  const int64_t first = tile * kWidth, left = n_ - first;
  if (q[0].table) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) s[i][n] = s[i][n] * scale_ + load(q[i].table + first + n * kLanes<T>);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) s[i][n] *= scale_;
  }
  const bool masked = q[0].mask && !(range_.unmasked && range_.unmasked[tile]);
  if (q[0].bias || masked) {
    alignas(64) T rows[R][NV * kLanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) store(rows[i] + n * kLanes<T>, s[i][n]);
    if (q[0].bias) add_rows(&Query<T>::bias, r, tile, R, NV, rows[0]);
    if (masked) add_rows(&Query<T>::mask, r, tile, R, NV, rows[0]);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) s[i][n] = load(rows[i] + n * kLanes<T>);
  }
  if (left < NV * kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) s[i][n] = keep_first(s[i][n], left - n * kLanes<T>, -kInfinity);
  }
}

// Adds the keys of a tile in rows of `bias` or `mask` to `vectors` vectors a row of scores. Not inlined: beside the
// unrolled loops above it would cost them registers.
template <class P>
__attribute__((noinline)) void Attention<P>::add_rows(const T* Query<T>::* which, int64_t r, int64_t tile, int count,
                                                      int vectors, T* scores) const {
  for (int i = 0; i < count; ++i)
    for (int n = 0; n < vectors; ++n, scores += kLanes<T>) {
      const int64_t at = tile * kWidth + n * kLanes<T>;
      store(scores, load(scores) + load_first(queries_[r + i].*which + at, n_ - at));
    }
}

// Channels [c, ...) of R rows that are padded_ apart: words of the panels from row r on, times rows packed in rows,
// summed over the keys of the chosen tiles, times a factor each.
template <class P>
template <int R, int NV>
__attribute__((noinline)) void Attention<P>::sum_over_keys(const T* panels, const Word* in_rows, int64_t r, int64_t c,
                                                           const T* factors, T* to) const {
  constexpr int step = NV * kLanes<Word>;
  const Word* column = in_column(in_rows, c, tiles_ * kWidth);
  if constexpr (P::tiles) {
    alignas(64) T o[P::kRows][NV * kLanes<T>];
    P::template clear<NV>();
    for (int64_t tile = range_.first; tile < range_.last; ++tile)
      P::template multiply<NV>((const Word*)panel(panels, tile, r), kWidth, column + tile * kWords * step, step,
                               kWords);
    P::template store_rows<NV>(o[0], NV * kLanes<T>);
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) store(to + i * padded_ + c + n * kLanes<T>, load(o[i] + n * kLanes<T>) * factors[i]);
    return;
  }
  Vec<T> o[R][NV];
  clear(o);
  for (int64_t tile = range_.first; tile < range_.last; ++tile)
    multiply_tile<P, R, NV, kWidth>((const Word*)panel(panels, tile, r), 1, column + tile * kWords * step, step,
                                    steps_in_tile(tile), o);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) store(to + i * padded_ + c + n * kLanes<T>, o[i][n] * factors[i]);
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
