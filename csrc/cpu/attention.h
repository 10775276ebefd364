// Softmax attention of one group of positions and one head, on the CPU: what all families share. A family says which
// rows of its tensors form a group and what is added to their scores; the softmax, its gradient and the use of the
// memory are here.
//
// The keys and values of the group are packed once, in L2-sized panels; then the queries pass over them, a block of
// kQueryRows at a time. A query's scores are all at hand before its softmax starts, forward and backward, so the
// backward pass needs nothing from the forward one.
//
// Compiling this takes most of the build's time. So it is compiled once an instruction set, by attention_<isa>.cpp, and
// families are called through their Group, for many rows at a time.
#pragma once
#include "philox.h"
#include "rows.h"

namespace vidattn {
namespace VIDATTN_ISA {

// What is added to the scores of a query; null: nothing.
template <class T>
struct Query {
  const T* table = nullptr;  // a row of biases that can be read up to the end of the last tile
  const T* bias = nullptr;   // rows of as many numbers as there are keys
  const T* mask = nullptr;
  T* gradient = nullptr;  // of as many as there are keys: takes the gradients of the scores
};

struct Tiles {
  int64_t first, last;
  const bool* unmasked;  // by tile: masks add nothing there; or null
};

// What a family provides. Rows of queries (slots kQ, kDout, kOut, kDq) are counted over the group's queries, those of
// keys over all of its positions.
template <class P>
class Group {
 public:
  using T = typename P::Acc;
  using Value = typename P::Value;

  int64_t keys = 0;             // positions of this group, at most those that the engine was made for
  int64_t queries = 0;          // of this group
  int64_t head = 0, index = 0;  // numbers of the head and of the group, for the dropout mask

  // Points to rows [first, first + count); those that must be put together go to `spare`, kMaxDim apart.
  virtual void read(Slot slot, int64_t first, int64_t count, const Value** rows, Value* spare) const = 0;
  // Takes rows of a result, `step` apart, to be multiplied by factor.
  virtual void write(Slot slot, int64_t first, int64_t count, const T* from, int64_t step, T factor) = 0;
  // Fetches rows of a result into the cache before they are written.
  virtual void fetch_to_write(Slot slot, int64_t first, int64_t count) const = 0;
  // Fetches positions [begin, end) of the next group in the tensors up to slot `last`.
  virtual void fetch_next(int64_t begin, int64_t end, Slot last) const = 0;

  // Its position among the keys.
  virtual int64_t position(int64_t query) const { return query; }
  virtual void describe(int64_t, int64_t, Query<T>*) const {}
  // Is told that longest_key() may be asked.
  virtual void keys_packed() {}
  // Narrows the tiles of keys that these queries need; may ask longest_query().
  virtual void choose_tiles(int64_t, int64_t, Tiles&) {}
  // Takes the maxima of the queries' scores and the sums of exp(score - maximum).
  virtual void keep_lse(int64_t, int64_t, const T*, const T*) const {}
};

template <int V>
struct Constant {
  static constexpr int value = V;
};

template <class P>
class Attention {
  using T = typename P::Acc;
  using Value = typename P::Value;
  using Word = typename P::Word;
  static constexpr int kWords = 2 * kLanes<T> / P::pack;  // words of a tile's row packed along the keys
  static constexpr int kBlocks = 56 / kQueryRows;         // query blocks that share one pass over the keys backward
  static constexpr T kInfinity = T(__builtin_inf());
  static constexpr int64_t kFraction = 1 << 20;

 public:
  static constexpr int kWidth = 2 * kLanes<T>;        // keys of a tile
  static constexpr int kRows = kBlocks * kQueryRows;  // rows in work at a time, at most
  static constexpr int64_t keys_in_tiles(int64_t keys) { return round_up(keys, kWidth); }

  // For groups of up to `keys` positions; takes its memory from the arena.
  Attention(int64_t keys, int64_t head_dim, double scale, Dropout dropout, bool backward, Arena& arena)
      : d_(head_dim),
        steps_(words_of<P>(d_)),
        padded_(round_up(d_, kLanes<Word>)),
        panel_rows_(backward ? kRows : kQueryRows),
        scale_(T(scale)),
        dropout_(dropout) {
    const int64_t lanes = keys_in_tiles(keys);
    spare_ = arena.take<Value>((backward && kRows > kWidth ? kRows : kWidth) * kMaxDim);
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

  void forward(Group<P>& group);
  void backward(Group<P>& group);

  // Squares of the largest |q| of the first `count` rows in work and of the largest |k|; NaN where one is not finite.
  T longest_query(int64_t count) const;
  T longest_key() const;

 private:
  static VIDATTN_INLINE Vec<T> add_squares(Vec<Word> words, Vec<T> c) { return P::multiply_add(words, words, c); }

  // Where the column of channel c begins in an operand of `of` rows.
  template <class W>
  static VIDATTN_INLINE W* in_column(W* in_rows, int64_t c, int64_t of) {
    return in_rows + c * (of / P::pack);
  }
  VIDATTN_INLINE void row_columns(const Value* const* rows, int64_t count, int64_t first, int64_t of, Word* to) const;
  void start_group(const Group<P>& group) { n_ = group.keys, tiles_ = ceil_div(n_, kWidth); }
  void pack_in_lanes(const Group<P>& group, Slot slot, Word* to) const;
  void pack_in_rows(const Group<P>& group, Slot slot, Word* to) const;
  void load_rows(const Group<P>& group, Slot slot, int64_t first, int64_t count, int64_t padded, Word* to,
                 Word* in_rows) const;
  void start_block(Group<P>& group, int64_t first, int64_t count, int64_t padded);

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

  // Runs body(tile, number of vectors as a constant) over the chosen tiles.
  template <class F>
  VIDATTN_INLINE void for_each_tile(F body) const {
    const bool half = n_ - (tiles_ - 1) * kWidth <= kLanes<T> && range_.last == tiles_;
    for (int64_t tile = range_.first; tile < range_.last - half; ++tile) body(tile, Constant<2>{});
    if (half) body(tiles_ - 1, Constant<1>{});
  }
  int64_t steps_in_tile(int64_t tile) const {
    const int64_t left = n_ - tile * kWidth;
    return ceil_div(left < kWidth ? left : kWidth, P::pack);
  }

  // Runs body(channel, number of vectors as a constant) over head_dim, two vectors of channels at a time.
  template <class F>
  VIDATTN_INLINE void for_each_column(F body) const {
    int64_t c = 0;
    for (; c + kWidth <= padded_; c += kWidth) body(c, Constant<2>{});
    if (c < padded_) body(c, Constant<1>{});
  }

  // Turns the scores of a row into e^(score - m), hands them to finish(tile, vectors, their number as a constant) and
  // returns their sums over the lanes.
  template <class Exp, class F>
  VIDATTN_INLINE Vec<T> exponentials(int64_t r, T m, F finish) {
    Vec<T> total[2] = {};
    for_each_tile([&](int64_t tile, auto vectors) {
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

  template <int R, int NV>
  void multiply_rows(const Word* rows, const Word* lanes, int64_t r, int64_t tile, T* panels, Vec<T>* top) const;
  VIDATTN_INLINE Vec<T> finish_row(int64_t r) const;
  template <int R, int NV>
  VIDATTN_INLINE void finish_scores(int64_t r, int64_t tile, Vec<T> (&s)[R][NV]) const;
  void add_rows(const T* Query<T>::* which, int64_t r, int64_t tile, int count, int vectors, T* scores) const;
  template <int R, int NV>
  void sum_over_keys(const T* panels, const Word* in_rows, int64_t r, int64_t c, const T* factors, T* to) const;

  template <int R>
  void forward_block(Group<P>& group, int64_t first);
  void backward_rows(Group<P>& group, int64_t first, int64_t count);
  template <int R>
  void softmax_gradient(const Group<P>& group, int64_t first, int64_t r, const Vec<T>* top);
  template <int NV>
  void add_key_gradients(int64_t tile, int64_t c, int64_t count);
  template <int R, int NV>
  void add_block_of_key_gradients(int64_t tile, int64_t key, int64_t c, int64_t count);

  // Fetches the next share of what the next group will read. Many small shares: a core can wait for few rows at a time.
  void fetch_ahead(const Group<P>& group, Slot last) {
    const int64_t begin = fetched_ / kFraction;
    fetched_ += share_;
    const int64_t end = fetched_ / kFraction;
    if (begin < end) group.fetch_next(begin, end < n_ ? end : n_, last);
  }
  // All of it after so many calls; none come where a group has no query. Shares have fractions, because a division
  // takes as long as a part of the product.
  void start_fetching(int64_t points) { fetched_ = 0, share_ = n_ * kFraction / (points > 0 ? points : 1) + 1; }
  int64_t columns() const { return ceil_div(padded_, kWidth); }

  T* panel(T* base, int64_t tile, int64_t r) const { return base + (tile * panel_rows_ + r) * kWidth; }
  const T* panel(const T* base, int64_t tile, int64_t r) const { return base + (tile * panel_rows_ + r) * kWidth; }

  const int64_t d_, steps_, padded_, panel_rows_;
  int64_t n_ = 0, tiles_ = 0;  // of the group in work
  const T scale_;
  const Dropout dropout_;
  Tiles range_{};
  Query<T> queries_[kRows];          // rows in work
  int64_t fetched_ = 0, share_ = 0;  // rows of the next group, in fractions of a row

  // "In lanes" is [tile][step][key of the tile], "in rows" [column][row / pack][channel of the column], where a column
  // is two vectors or the last one: so a product reads one run of memory. A panel is [tile][row in work][kWidth].
  Word *keys_in_lanes_, *values_in_lanes_, *keys_in_rows_, *values_in_rows_;
  Word *q_, *dout_;                  // [row in work][kMaxDim]
  Word *q_in_rows_, *dout_in_rows_;  // rows in work
  T *scores_, *dscores_;             // panels; where words of them are needed, these replace them
  T *dk_, *dv_;                      // [key][channel]
  T* keep_;                          // [row of a pair][key]: dropout factors
  Value* spare_;                     // [row][kMaxDim]: rows that a family puts together
};

// The kernels of a family: of a class that lays out scratch memory and runs ranges of tasks. There are none backward on
// tile registers: the products of keys would need queries packed once more.
template <class P, class Family, class Args>
constexpr Kernels<Args> kernels_of() {
  Kernels<Args> kernels = {[](const Args& args, bool backward) { return Family(args, backward, nullptr).bytes(); },
                           [](const Args& args, int64_t begin, int64_t end, char* scratch) {
                             [[maybe_unused]] Registers<P> registers;
                             Family(args, false, scratch).forward(begin, end);
                           },
                           nullptr};
  if constexpr (!P::tiles)
    kernels.backward = [](const Args& args, int64_t begin, int64_t end, char* scratch) {
      Family(args, true, scratch).backward(begin, end);
    };
  return kernels;
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
