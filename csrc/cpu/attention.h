// Softmax attention of one group of positions and one head, on the CPU: what all families share. A family says which
// rows of its tensors form a group and what is added to their scores; the softmax, its gradient and the use of the
// memory are here.
//
// The keys and values of the group are packed once, in L2-sized panels; then the queries pass over them, a block of
// kQueryRows at a time. A query's scores are all at hand before its softmax starts, forward and backward, so the
// backward pass needs nothing from the forward one.
//
// What a family provides is a class G with
//   query_count(), query(n)         positions that are queries; every position 0 .. keys - 1 is a key
//   head(), index()                 numbers of the head and of the group, for the dropout mask
//   row(slot, i)                    channels of position i in a tensor that is read
//   put(slot, i, c, row, factor, n) takes channels [c, c + n) of a result, each to be multiplied by factor
//   keep_lse(i, m, total)           takes the maximum of query i's scores and sum(exp(scores - m))
//   prefetch(begin, end, last)      fetches positions of the next group in the tensors up to slot `last`
//   expect(slot, i)                 fetches a row of a result before it is written
//   keys_packed()                   is told that longest_key() may be asked
//   set_row(r, i)                   is told that row r of the block in work is query i
//   choose_tiles(first, count)      which tiles of keys queries [first, first + count) need; may ask longest_query()
//   finish_scores(r, tile, scale, s)
//                                   turns products of rows [r, ...) in work and the keys of a tile into scores
//   add_score_gradients(r, key, n, gradients)
//                                   takes a vector of them, for keys [key, key + n)
#pragma once
#include "philox.h"
#include "slots.h"
#include "tile.h"

namespace vidattn {
namespace VIDATTN_ISA {

constexpr int kMaxDim = 128;

template <class In>
constexpr In kZeros[kMaxDim] = {};

struct TileRange {
  int64_t first, last;
};

// Brings a row of n values into L2, or prepares it to be written.
template <bool Write = false, class In>
VIDATTN_INLINE void fetch_row(const In* row, int64_t n) {
  for (int64_t byte = 0; byte < n * int64_t(sizeof(In)); byte += 64)
    __builtin_prefetch((const char*)row + byte, Write, 2);
}

template <int V>
struct Constant {
  static constexpr int value = V;
};

template <class P, class In>
class Attention {
  using T = typename P::Acc;
  using Word = typename P::Word;
  static constexpr int kWords = 2 * kLanes<T> / P::pack;  // words of a tile's row packed along the keys
  static constexpr int kBlocks = 56 / kQueryRows;         // query blocks that share one pass over the keys backward
  static constexpr T kInfinity = T(__builtin_inf());

 public:
  static constexpr int kWidth = 2 * kLanes<T>;        // keys of a tile
  static constexpr int kRows = kBlocks * kQueryRows;  // rows in work at a time, at most
  static constexpr int64_t keys_in_tiles(int64_t keys) { return round_up(keys, kWidth); }

  // Takes its memory from the arena.
  Attention(int64_t keys, int64_t head_dim, double scale, Dropout dropout, bool backward, Arena& arena)
      : n_(keys),
        d_(head_dim),
        steps_(ceil_div(d_, P::pack)),
        padded_(round_up(d_, kLanes<Word>)),
        tiles_(ceil_div(n_, kWidth)),
        panel_rows_(backward ? kRows : kQueryRows),
        scale_(T(scale)),
        dropout_(dropout) {
    const int64_t lanes = tiles_ * kWidth;
    keys_in_lanes_ = arena.take<Word>(lanes * steps_);
    (backward ? keys_in_rows_ : values_in_rows_) = arena.take<Word>(lanes / P::pack * padded_);
    q_ = arena.take<Word>(panel_rows_ * kMaxDim);
    scores_ = arena.take<T>(lanes * panel_rows_);
    keep_ = arena.take<T>(P::pack * lanes);
    if (!backward) return;
    values_in_lanes_ = arena.take<Word>(lanes * steps_);
    dout_ = arena.take<Word>(kRows * kMaxDim);
    q_in_rows_ = arena.take<Word>(kRows / P::pack * padded_);
    dout_in_rows_ = arena.take<Word>(kRows / P::pack * padded_);
    dscores_ = arena.take<T>(lanes * kRows);
    dk_ = arena.take<T>(lanes * padded_);
    dv_ = arena.take<T>(lanes * padded_);
  }

  template <class G>
  void forward(G& group);
  template <class G>
  void backward(G& group);

  TileRange all_tiles() const { return {0, tiles_}; }

  // Squares of the largest |q| of the first `count` rows in work and of the largest |k|; NaN where one is not finite.
  T longest_query(int64_t count) const {
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
  T longest_key() const {
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

 private:
  static VIDATTN_INLINE Vec<T> add_squares(Vec<Word> words, Vec<T> c) { return P::multiply_add(words, words, c); }

  // [tile][step][key in lane]: the operand of products summed over head_dim.
  template <class G>
  void pack_in_lanes(G& group, Slot slot, Word* to) const {
    for (int64_t tile = 0; tile < tiles_; ++tile, to += kWidth * steps_) {
      const In* rows[kWidth];
      const int64_t left = n_ - tile * kWidth;
      for (int64_t lane = 0; lane < kWidth; ++lane)
        rows[lane] = lane < left ? group.row(slot, tile * kWidth + lane) : kZeros<In>;
      transpose<P>(rows, left > kLanes<T> ? kWidth : kLanes<T>, d_, to, kWidth);
    }
  }

  // [key][channel]: the operand of products summed over the keys.
  template <class G>
  void pack_in_rows(G& group, Slot slot, Word* to) const {
    for (int64_t j = 0; j < n_; j += P::pack, to += padded_) {
      const In* rows[P::pack];
      for (int s = 0; s < P::pack; ++s) rows[s] = j + s < n_ ? group.row(slot, j + s) : kZeros<In>;
      P::column_words(rows, d_, padded_, to);
    }
  }

  // Runs body(first row, number of rows as a constant) over blocks that cover `count` rows with few to spare: full
  // ones, then one or two smaller ones. Only the last has an odd number of rows.
  template <class F>
  static VIDATTN_INLINE void for_each_block(int64_t count, F body) {
    constexpr int half = kQueryRows / 2, quarter = half > 4 ? 4 : half;
    for (int64_t first = 0; first < count;) {
      const int64_t left = count - first;
      if (left > half + 1) {
        body(first, Constant<kQueryRows>{});
        first += kQueryRows;
      } else if (quarter < left && left <= half) {
        body(first, Constant<half>{});
        first += half;
      } else if (left > 1) {
        body(first, Constant<quarter>{});
        first += quarter;
      } else {
        body(first, Constant<1>{});
        first += 1;
      }
    }
  }

  // Runs body(tile, number of vectors, is it the partial last tile) over the chosen tiles, the two arguments as
  // constants.
  template <class F>
  VIDATTN_INLINE void for_each_tile(F body) const {
    const int64_t full = n_ / kWidth, last = range_.last;
    for (int64_t tile = range_.first; tile < full && tile < last; ++tile) body(tile, Constant<2>{}, Constant<0>{});
    if (last <= full) return;
    if (n_ - full * kWidth > kLanes<T>)
      body(full, Constant<2>{}, Constant<1>{});
    else
      body(full, Constant<1>{}, Constant<1>{});
  }
  int64_t steps_in_tile(int64_t tile) const {
    const int64_t left = n_ - tile * kWidth;
    return ceil_div(left < kWidth ? left : kWidth, P::pack);
  }

  // Runs body(channel, number of vectors) over head_dim, two vectors of channels at a time.
  template <class F>
  VIDATTN_INLINE void for_each_column(F body) const {
    int64_t c = 0;
    for (; c + kWidth <= padded_; c += kWidth) body(c, Constant<2>{});
    if (c < padded_) body(c, Constant<1>{});
  }

  // Scores of rows [r, r + R) in work for the keys of a tile, -inf beyond the last key; and their maxima.
  template <int R, int NV, bool Tail, class G>
  VIDATTN_INLINE void score_tile(G& group, int64_t r, int64_t tile, Vec<T>* top) {
    Vec<T> s[R][NV];
    clear(s);
    multiply_tile<P, R, NV, kMaxDim>(q_ + r * kMaxDim, 1, keys_in_lanes_ + tile * kWidth * steps_, kWidth, steps_, s);
    group.template finish_scores<R, NV>(r, tile, scale_, s);
    T* to = panel(scores_, tile, r);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) {
        if (Tail) s[i][n] = keep_first(s[i][n], n_ - tile * kWidth - n * kLanes<T>, -kInfinity);
        store(to + i * kWidth + n * kLanes<T>, s[i][n]);
        top[i] = max<T>(top[i], s[i][n]);
      }
  }

  // Turns the scores of a row into e^(score - m), hands them to finish(tile, vectors, their number as a constant) and
  // returns their sums over the lanes.
  template <class Exp, class F>
  VIDATTN_INLINE Vec<T> exponentials(int64_t r, T m, F finish) {
    Vec<T> total[2] = {};
    for_each_tile([&](int64_t tile, auto vectors, auto) {
      constexpr int NV = decltype(vectors)::value;
      const T* s = panel(scores_, tile, r);
      Vec<T> p[2] = {};
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) {
        p[n] = exp<Exp, T>(load(s + n * kLanes<T>) - m);
        total[n] += p[n];
      }
      finish(tile, p, vectors);
    });
    return total[0] + total[1];
  }

  template <int R, class G>
  void forward_block(G& group, int64_t first);
  template <class G>
  void backward_rows(G& group, int64_t first, int64_t count);
  template <int R, class G>
  void softmax_gradient(G& group, int64_t first, int64_t r, const Vec<T>* top);
  template <class G>
  void add_key_gradients(G& group, int64_t tile, int64_t count);

  // Fetches the next share of what the next group will read. Many small shares: a core can wait for few rows at a time.
  template <class G>
  VIDATTN_INLINE void fetch_ahead(G& group, Slot last) {
    const int64_t begin = fetched_;
    fetched_ = n_ * ++point_ / points_;
    group.prefetch(begin, fetched_, last);
  }
  void start_fetching(int64_t points) { point_ = fetched_ = 0, points_ = points; }
  int64_t columns() const { return ceil_div(padded_, kWidth); }

  T* panel(T* base, int64_t tile, int64_t r) const { return base + (tile * panel_rows_ + r) * kWidth; }

  const int64_t n_, d_, steps_, padded_, tiles_, panel_rows_;
  const T scale_;
  const Dropout dropout_;
  TileRange range_{};
  int64_t point_ = 0, points_ = 1, fetched_ = 0;  // in a group's work, where shares of the next one are fetched

  // "In lanes" is [tile][step][key of the tile], "in rows" [row / pack][channel], a panel [tile][row in work][kWidth].
  Word *keys_in_lanes_, *values_in_lanes_, *keys_in_rows_, *values_in_rows_;
  Word *q_, *dout_;                  // [row in work][kMaxDim]
  Word *q_in_rows_, *dout_in_rows_;  // rows in work
  T *scores_, *dscores_;             // panels; where words of them are needed, these replace them
  T *dk_, *dv_;                      // [key][channel]
  T* keep_;                          // [row of a pair][key]: dropout factors
};

}  // namespace VIDATTN_ISA
}  // namespace vidattn

#include "attention_backward.h"
#include "attention_forward.h"
