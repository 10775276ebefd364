// Shifted-window 3D attention on the CPU: one pass forward, one backward, for one instruction set.
//
// A task owns one head and one or more windows. It packs the window's keys and values once, in L2-sized panels, then
// passes over the query tokens a block of kQueryRows at a time. Nothing is rolled, padded or partitioned: a window's
// tokens are found by index arithmetic.
//
// The bias of a query row is one contiguous run of an expanded table. With P tokens to a (height, width) slice, the
// pair (i, j) depends on the slices of i and j only through their difference, so expanded[p_i][(d_j - d_i + slices - 1)
// * P + p_j] holds every row of the window at offset (slices - 1 - d_i) * P: (2 * slices - 1) * P^2 entries instead of
// (slices * P)^2. The bias gradient is summed in the same layout.
#pragma once
#include "philox.h"
#include "tile.h"
#include "window3d_args.h"
#include "window3d_tokens.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P, class In>
class Window3d {
  using T = typename P::Acc;
  using Word = typename P::Word;
  static constexpr int kWidth = 2 * kLanes<T>;         // keys of a tile
  static constexpr int kWords = kWidth / P::pack;      // words of a tile's row packed along the keys
  static constexpr int kPairs = kQueryRows / P::pack;  // words of a tile's column packed along the queries
  static constexpr int kBlocks = 56 / kQueryRows;      // query blocks that share one pass over the keys in the backward
  static constexpr int kMaxDim = 128;
  static constexpr T kInfinity = T(__builtin_inf());

 public:
  // Lays out the scratch memory; with base == nullptr only bytes() may be called.
  Window3d(const Window3dArgs& args, bool backward, char* base)
      : a_(args),
        n_(args.tokens),
        d_(args.head_dim),
        steps_(ceil_div(d_, P::pack)),
        padded_(round_up(d_, kLanes<Word>)),
        tiles_(ceil_div(n_, kWidth)),
        slice_(args.bias_is_table ? args.bias_extent[0] * args.bias_extent[1] : n_),
        slices_(ceil_div(n_, slice_)),
        scale_(T(args.scale)),
        dropout_{args.dropout_p, args.seed},
        arena_(base),
        windows_{{args, tiles_ * kWidth, arena_}, {args, tiles_ * kWidth, arena_}} {
    Arena& arena = arena_;
    const int64_t keys = tiles_ * kWidth, blocks = backward ? kBlocks : 1;
    bias_offset_ = arena.take<int64_t>(n_);
    expanded_size_ = a_.bias_is_table ? (slice_ < n_ ? slice_ : n_) * (2 * slices_ - 1) * slice_ : 0;
    if (a_.bias_is_table) {
      table_ = arena.take<T>(a_.bias_size);
      expanded_ = arena.take<T>(expanded_size_ + kWidth);  // the last tile of a row reads on
    }
    tile_regions_ = arena.take<int>(tiles_);
    stage_ = arena.take<Word>(kWidth * kMaxDim);
    keys_in_lanes_ = arena.take<Word>(tiles_ * kWidth * steps_);
    (backward ? keys_in_rows_ : values_in_rows_) = arena.take<Word>(keys / P::pack * padded_);
    q_ = arena.take<Word>(blocks * kQueryRows * kMaxDim);
    keep_ = arena.take<T>(keys > kQueryRows * kWidth ? keys : kQueryRows * kWidth);
    zero_row_ = arena.take<T>(keys);
    if (!backward) {
      scores_ = arena.take<T>(tiles_ * kQueryRows * kWidth);
      if (P::pack > 1) weights_ = arena.take<Word>(tiles_ * kQueryRows * kWords);
    } else {
      values_in_lanes_ = arena.take<Word>(tiles_ * kWidth * steps_);
      dout_ = arena.take<Word>(blocks * kQueryRows * kMaxDim);
      scores_ = arena.take<T>(blocks * kQueryRows * kWidth);
      dscores_ = arena.take<Word>(tiles_ * blocks * kQueryRows * kWords);
      dk_ = arena.take<T>(keys * padded_);
      dv_ = arena.take<T>(keys * padded_);
      if (P::pack > 1) {
        q_pairs_ = arena.take<Word>(blocks * kPairs * padded_);
        dout_pairs_ = arena.take<Word>(blocks * kPairs * padded_);
        weight_pairs_ = arena.take<Word>(blocks * kPairs * kWidth);
        dscore_pairs_ = arena.take<Word>(blocks * kPairs * kWidth);
      }
      if (a_.dbias_partial && a_.bias_is_table) dexpanded_ = arena.take<T>(expanded_size_);
      dpad_ = arena.take<T>(2 * d_);
    }
    if (base)
      for (int64_t j = 0; j < keys; ++j) zero_row_[j] = 0;
  }
  int64_t bytes() const { return arena_.used(); }

  void forward(int64_t begin, int64_t end) {
    fill_bias_offsets();
    if (begin < end) announce(begin / a_.groups, begin % a_.groups);
    for (int64_t task = begin; task < end; ++task) {
      load_head(task / a_.groups);
      take_announced();
      if (task + 1 < end) announce((task + 1) / a_.groups, (task + 1) % a_.groups);
      Tokens q = tokens(kQ), out = tokens(kOut);
      pack_keys(tokens(kK));
      pack_in_rows(tokens(kV), values_in_rows_);
      for (int64_t first = 0; first < now_->query_count(); first += kQueryRows) {
        prefetch(first, first + kQueryRows, kV);
        forward_block(q, out, first);
      }
    }
  }

  void backward(int64_t begin, int64_t end) {
    fill_bias_offsets();
    if (begin < end) announce(begin / a_.chunks, first_group(begin));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / a_.chunks, chunk = task % a_.chunks, last = a_.groups * (chunk + 1) / a_.chunks;
      load_head(head);
      start_gradients(chunk);
      for (int64_t group = first_group(task); group < last; ++group) {
        take_announced();
        if (group + 1 < last)
          announce(head, group + 1);
        else if (task + 1 < end)
          announce((task + 1) / a_.chunks, first_group(task + 1));
        backward_window();
      }
      finish_gradients(chunk);
    }
  }

 private:
  enum Slot { kQ, kK, kV, kOut, kDout, kDq, kDk, kDv };  // as in WindowTokens::offsets

  // One head of a token tensor within a window: row(i) is null for padding that holds zeros.
  struct Tokens {
    In* base;
    const int64_t* offset;
    const WindowTokens<T>* window;
    In* pad;
    In* row(int64_t i) const { return window->real(i) ? base + offset[i] : pad; }
  };

  Tokens tokens(Slot slot) const { return tokens(slot, *now_, head_); }
  Tokens tokens(Slot slot, WindowTokens<T>& window, int64_t head) const {
    const TokenTensor* all[] = {&a_.q, &a_.k, &a_.v, &a_.out, &a_.dout, &a_.dq, &a_.dk, &a_.dv};
    In* pad = a_.pad_qkv && slot <= kV ? (In*)a_.pad_qkv + (slot * a_.heads + head) * d_ : nullptr;
    return {(In*)all[slot]->data + head * all[slot]->stride[4], window.offsets(slot), &window, pad};
  }

  // The window after the current one is known in advance, so that its rows can be fetched while the current one is
  // computed: they are short (one head) and far apart, which no hardware prefetcher foresees.
  void announce(int64_t head, int64_t group) {
    next_->load(group);
    announced_head_ = head;
    announced_ = true;
  }
  void take_announced() {
    WindowTokens<T>* window = now_;
    now_ = next_, next_ = window;
    announced_ = false;
  }
  // Fetches tokens [begin, end) of the next window, of the tensors up to `last`, into L2.
  void prefetch(int64_t begin, int64_t end, Slot last) const {
    if (!announced_) return;
    for (int slot = kQ; slot <= last; ++slot) {
      const Tokens tensor = tokens(Slot(slot), *next_, announced_head_);
      for (int64_t i = begin; i < end && i < n_; ++i) {
        const char* row = (const char*)tensor.row(i);
        for (int64_t byte = 0; row && byte < d_ * int64_t(sizeof(In)); byte += 64) __builtin_prefetch(row + byte, 0, 2);
      }
    }
  }

  int64_t first_group(int64_t task) const { return a_.groups * (task % a_.chunks) / a_.chunks; }

  void fill_bias_offsets() {
    for (int64_t i = 0; i < n_; ++i)
      bias_offset_[i] =
          a_.bias_is_table ? ((i % slice_) * (2 * slices_ - 1) + slices_ - 1 - i / slice_) * slice_ : i * n_;
  }

  // Calls run(position in the expanded table, row of the reversed table, length) for every contiguous run that both
  // have in common. The table is reversed so that its rows ascend with the key's coordinates.
  template <class F>
  void for_each_run(F run) const {
    const int64_t height = a_.bias_extent[0], width = a_.bias_extent[1], *w = a_.bias_window,
                  used = slice_ < n_ ? slice_ : n_;
    for (int64_t p = 0; p < used; ++p)
      for (int64_t t = 0; t < 2 * slices_ - 1; ++t)
        for (int64_t y = 0; y < height; ++y) {
          const int64_t delta_d = t - (slices_ - 1), delta_h = y - p / width, delta_w = -(p % width);
          const int64_t row =
              ((delta_d + w[0] - 1) * (2 * w[1] - 1) + delta_h + w[1] - 1) * (2 * w[2] - 1) + delta_w + w[2] - 1;
          run((p * (2 * slices_ - 1) + t) * slice_ + y * width, row, width);
        }
  }

  void load_head(int64_t head) {
    if (head == head_) return;
    head_ = head;
    bias_ = nullptr;
    if (!a_.bias) return;
    bias_ = (const T*)a_.bias + head * a_.bias_size;
    if (!a_.bias_is_table) return;
    for (int64_t row = 0; row < a_.bias_size; ++row)
      table_[row] = ((const T*)a_.bias)[(a_.bias_size - 1 - row) * a_.heads + head];
    T low = table_[0], high = table_[0];
    for (int64_t row = 1; row < a_.bias_size; ++row) {
      low = table_[row] < low ? table_[row] : low;
      high = table_[row] > high ? table_[row] : high;
    }
    bias_range_ = high - low;
    for_each_run([&](int64_t to, int64_t row, int64_t length) {
      for (int64_t i = 0; i < length; ++i) expanded_[to + i] = table_[row + i];
    });
    bias_ = expanded_;
  }

  // [tile][step][key in lane]: the operand of products summed over head_dim.
  void pack_in_lanes(const Tokens& tensor, Word* to) {
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const int64_t j = tile * kWidth + lane;
        P::row_words(j < n_ ? tensor.row(j) : nullptr, d_, padded_, stage_ + lane * kMaxDim);
      }
      transpose(stage_, kMaxDim, kWidth, steps_, to + tile * kWidth * steps_);
    }
  }

  bool has_regions() const { return now_->has_regions() && !a_.mask; }

  void pack_keys(const Tokens& k) {
    pack_in_lanes(k, keys_in_lanes_);
    if (!has_regions()) return;
    Vec<T> longest{}, total{};
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      tile_regions_[tile] = 0;
      for (int64_t j = tile * kWidth; j < (tile + 1) * kWidth && j < n_; ++j)
        tile_regions_[tile] |= 1 << now_->region(j);
      for (int64_t lane = 0; lane < kWidth; lane += kLanes<T>) {
        Vec<T> squares{};
        for (int64_t s = 0; s < steps_; ++s)
          squares = P::add_squares(load(keys_in_lanes_ + (tile * steps_ + s) * kWidth + lane), squares);
        longest = max<T>(longest, squares);
        total += squares;
      }
    }
    longest_key_ = largest<T>(longest) + 0 * sum<T>(total);  // NaN when any key is not finite, which max would lose
  }

  // Finds the range of tiles that a block of packed queries (numbers [first, first + count)) attends to, and whether
  // the block lies in one region. Tiles of other regions alone are left out where that cannot be seen in the result: a
  // masked key's score is at most 2 max|q| max|k| + (bias range) + mask_value above that of the query itself, and at
  // -40 its weight is e^-40 = 4e-18 of the largest. float64 could see it.
  void choose_tiles(int64_t first, int count) {
    first_tile_ = 0, last_tile_ = tiles_;
    block_regions_ = 0;
    if (!has_regions()) return;
    T longest = 0, total = 0;
    for (int r = 0; r < count; ++r) {
      block_regions_ |= 1 << now_->region(now_->query(first + r));
      Vec<T> squares{};
      for (int64_t c = 0; c < padded_; c += kLanes<T>) squares = P::add_squares(load(q_ + r * kMaxDim + c), squares);
      const T length = sum<T>(squares);
      longest = length > longest ? length : longest;
      total += length;  // not finite when any query is not
    }
    const T score = T(__builtin_sqrt(longest * longest_key_)) * __builtin_fabs(scale_) + 0 * total;
    const bool unseen = 2 * score + bias_range_ < T(-40 - a_.mask_value);  // false for NaN
    if (!unseen || (sizeof(T) == 8 && a_.mask_value != -__builtin_inf())) return;
    while (!(tile_regions_[first_tile_] & block_regions_)) ++first_tile_;
    while (!(tile_regions_[last_tile_ - 1] & block_regions_)) --last_tile_;
  }

  // Whether the mask is zero for a tile: its keys and all queries of the block lie in one region.
  bool unmasked(int64_t tile) const {
    const bool one_region = block_regions_ && !(block_regions_ & (block_regions_ - 1));
    return one_region && tile_regions_[tile] == block_regions_;
  }

  // [key][channel]: the operand of products summed over the keys.
  void pack_in_rows(const Tokens& tensor, Word* to) {
    for (int64_t j = 0; j < tiles_ * kWidth; j += P::pack) {
      const In* rows[P::pack];
      for (int s = 0; s < P::pack; ++s) rows[s] = j + s < n_ ? tensor.row(j + s) : nullptr;
      P::column_words(rows, d_, padded_, to + j / P::pack * padded_);
    }
  }

  // Scores of a query block for the keys of a tile: scaled products plus bias and mask; -inf beyond the last key.
  template <int NV, bool Tail>
  VIDATTN_INLINE void score_tile(const Word* q, int64_t tile, const T* const* bias, const T* const* mask,
                                 Vec<T> (&s)[kQueryRows][NV]) {
    const int64_t first = tile * kWidth, left = n_ - first;
    clear(s);
    multiply_tile<P, kQueryRows, NV, kMaxDim>(q, 1, keys_in_lanes_ + tile * kWidth * steps_, kWidth, steps_, s);
    // The bias comes last, not as the start of the sums: a large one would round every partial sum.
    if (bias_ && a_.bias_is_table) {
#pragma GCC unroll 16
      for (int r = 0; r < kQueryRows; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) s[r][n] = s[r][n] * scale_ + load(bias[r] + first + n * kLanes<T>);
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < kQueryRows; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) s[r][n] *= scale_;
    }
    const bool masked = mask[0] && !unmasked(tile);
    if ((bias_ && !a_.bias_is_table) || masked) {
      alignas(64) T rows[kQueryRows][NV * kLanes<T>];
#pragma GCC unroll 16
      for (int r = 0; r < kQueryRows; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) store(rows[r] + n * kLanes<T>, s[r][n]);
      if (bias_ && !a_.bias_is_table) add_rows(bias, first, NV, rows[0]);
      if (masked) add_rows(mask, first, NV, rows[0]);
#pragma GCC unroll 16
      for (int r = 0; r < kQueryRows; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) s[r][n] = load(rows[r] + n * kLanes<T>);
    }
    if (Tail) {
#pragma GCC unroll 16
      for (int r = 0; r < kQueryRows; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) s[r][n] = keep_first(s[r][n], left - n * kLanes<T>, -kInfinity);
    }
  }

  // Adds keys [first, ...) of dense bias or mask rows to `vectors` vectors a row of scores. Not inlined: beside the
  // unrolled loops above it would cost them registers.
  __attribute__((noinline)) void add_rows(const T* const* rows, int64_t first, int vectors, T* scores) const {
    for (int r = 0; r < kQueryRows; ++r)
      for (int n = 0; n < vectors; ++n, scores += kLanes<T>) {
        const int64_t at = first + n * kLanes<T>;
        store(scores, load(scores) + load_first(rows[r] + at, n_ - at));
      }
  }

  // Runs body(tile, number of vectors, is it the partial last tile) over the chosen tiles, the two arguments as
  // compile-time constants.
  template <class F>
  VIDATTN_INLINE void for_each_tile(F body) {
    const int64_t full = n_ / kWidth, last = last_tile_;
    for (int64_t tile = first_tile_; tile < full && tile < last; ++tile) body(tile, Constant<2>{}, Constant<0>{});
    if (last <= full) return;
    if (n_ - full * kWidth > kLanes<T>)
      body(full, Constant<2>{}, Constant<1>{});
    else
      body(full, Constant<1>{}, Constant<1>{});
  }
  template <int V>
  struct Constant {
    static constexpr int value = V;
  };
  int64_t steps_in_tile(int64_t tile) const {
    const int64_t left = n_ - tile * kWidth;
    return ceil_div(left < kWidth ? left : kWidth, P::pack);
  }

  void forward_block(const Tokens& q, const Tokens& out, int64_t first);
  Vec<T> softmax_row(int r, int64_t i, T largest_score);
  void backward_window();
  void backward_blocks(const Tokens& q, const Tokens& out, const Tokens& dout, const Tokens& dq, int64_t first);
  template <int NV, bool Tail>
  void backward_tile(int64_t tile, int64_t blocks);
  void add_key_gradients(int64_t tile, int64_t blocks);
  void start_gradients(int64_t chunk);
  void finish_gradients(int64_t chunk);

  // C = rows x head_dim, two vectors of channels at a time: load (or clear), multiply, store.
  template <class F>
  VIDATTN_INLINE void for_each_column(F body) {
    int64_t c = 0;
    for (; c + kWidth <= padded_; c += kWidth) body(c, Constant<2>{});
    if (c < padded_) body(c, Constant<1>{});
  }

  const Window3dArgs& a_;
  const int64_t n_, d_, steps_, padded_, tiles_, slice_, slices_;
  const T scale_;
  const Dropout dropout_;
  Arena arena_;
  int64_t expanded_size_;

  WindowTokens<T> windows_[2], *now_ = &windows_[0], *next_ = &windows_[1];
  bool announced_ = false;
  int64_t head_ = -1, announced_head_ = 0;
  const T* bias_ = nullptr;  // of the current head
  T bias_range_ = 0;
  T longest_key_ = 0;  // square of the largest |k| of the window
  int64_t first_tile_ = 0, last_tile_ = 0;
  int block_regions_ = 0;  // bit per region of the block's queries; 0 when the mask has no regions

  // Scratch memory. "In lanes" is [tile][step][key of the tile], "in rows" [key / pack][channel]; a block is
  // kQueryRows.
  int64_t* bias_offset_;                      // [query]: start of its row in bias_ and dbias_
  T *table_ = nullptr, *expanded_ = nullptr;  // one head's table, reversed; and expanded
  T *dexpanded_ = nullptr, *dpad_ = nullptr;  // gradients of the expanded table and of pad_qkv
  int* tile_regions_;                         // [tile]: bit per region of its keys
  Word* stage_;                               // rows of a tile on their way into lanes
  Word *keys_in_lanes_, *values_in_lanes_, *keys_in_rows_, *values_in_rows_;
  Word *q_, *dout_;                     // [block][row][kMaxDim]
  Word *q_pairs_, *dout_pairs_;         // [block][row / pack][channel]
  T* scores_;                           // forward [tile][row][key], backward [block][row][key]
  Word *weights_ = nullptr, *dscores_;  // [tile][row][key / pack], [tile][block][row][key / pack]
  Word *weight_pairs_, *dscore_pairs_;  // [block][row / pack][key]
  T *dk_, *dv_;                         // [key][channel]
  T *keep_, *zero_row_;                 // dropout factors; where rows without a query add theirs

  // The blocks of query rows in work.
  static constexpr int kRows = kBlocks * kQueryRows;
  const T *bias_row_[kRows], *mask_row_[kRows];
  T* dbias_row_[kRows];
  T lse_[kRows], delta_[kRows];
  int64_t query_of_row_[kRows];
  T* dbias_ = nullptr;
};

}  // namespace VIDATTN_ISA
}  // namespace vidattn

#include "window3d_backward.h"
#include "window3d_forward.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P, class In>
constexpr Window3dKernels window3d_kernels() {
  return {[](const Window3dArgs& args, bool backward) { return Window3d<P, In>(args, backward, nullptr).bytes(); },
          [](const Window3dArgs& args, int64_t begin, int64_t end, char* scratch) {
            Window3d<P, In>(args, false, scratch).forward(begin, end);
          },
          [](const Window3dArgs& args, int64_t begin, int64_t end, char* scratch) {
            Window3d<P, In>(args, true, scratch).backward(begin, end);
          }};
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
