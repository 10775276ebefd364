// One head's table of relative position biases, expanded so that the biases of a query are one contiguous run.
//
// With P tokens to a (height, width) slice, the pair (i, j) depends on the slices of i and j only through their
// difference, so expanded[p_i][(d_j - d_i + slices - 1) * P + p_j] holds every row of the window at offset
// (slices - 1 - d_i) * P: (2 * slices - 1) * P^2 entries instead of (slices * P)^2. The bias gradient is summed in the
// same layout.
//
// A window at a border of the shifted grid falls into parts, whose slices are rectangles of the window's. Every kind of
// rectangle has an expansion of its own, made when the head's first part of that kind comes.
#pragma once
#include "tile.h"
#include "window3d_args.h"

namespace vidattn {
namespace VIDATTN_ISA {

// The largest number less the smallest.
template <class T>
VIDATTN_INLINE T spread(const T* from, int64_t count) {
  constexpr int kLines = 32;  // side by side, for the compiler
  T low[kLines], high[kLines];
  for (int j = 0; j < kLines; ++j) low[j] = high[j] = from[0];
  int64_t i = 0;
  for (; i + kLines <= count; i += kLines)
    for (int j = 0; j < kLines; ++j) {
      low[j] = from[i + j] < low[j] ? from[i + j] : low[j];
      high[j] = from[i + j] > high[j] ? from[i + j] : high[j];
    }
  for (; i < count; ++i) {
    low[0] = from[i] < low[0] ? from[i] : low[0];
    high[0] = from[i] > high[0] ? from[i] : high[0];
  }
  for (int j = 1; j < kLines; ++j) {
    low[0] = low[j] < low[0] ? low[j] : low[0];
    high[0] = high[j] > high[0] ? high[j] : high[0];
  }
  return high[0] - low[0];
}

template <class T>
class ExpandedBias {
 public:
  // What an axis has of the window's: all of it, the places before the border, or those after it.
  enum Places { kAll, kBefore, kAfter };
  static constexpr int kKinds = 9;
  static constexpr int kind(Places height, Places width) { return 3 * height + width; }

  // Rows can be read up to `slack` entries beyond their end.
  ExpandedBias(const Window3dArgs& args, bool gradients, int64_t slack, Arena& arena)
      : a_(args),
        slices_(ceil_div(a_.tokens, extent(1) * extent(2))),
        has_parts_(extent(1) == a_.window[1] && extent(2) == a_.window[2]) {
    int64_t size = 0;
    for (int k = 0; k < kKinds; ++k) {
      Slice& s = slice_[k];
      s.top = first(1, Places(k / 3)), s.bottom = last(1, Places(k / 3));
      s.left = first(2, Places(k % 3)), s.right = last(2, Places(k % 3));
      s.rows = s.size() < a_.tokens ? s.size() : a_.tokens;
      s.at = size;
      const bool used =
          k == 0 || (has_parts_ && (a_.region_mask[1] || k / 3 == kAll) && (a_.region_mask[2] || k % 3 == kAll));
      size += used ? round_up(s.rows * (2 * slices_ - 1) * s.size(), kLanes<T>) + kLanes<T> : 0;
    }
    if (!a_.bias_is_table) return;
    table_ = arena.take<T>(a_.bias_size + kLanes<T>);
    biases_ = arena.take<T>(size + slack);
    if (!gradients) return;
    gradients_ = arena.take<T>(size);
    sums_ = arena.take<T>(a_.bias_size + kLanes<T>);
  }

  bool has_parts() const { return has_parts_; }
  int64_t slice() const { return slice_[0].size(); }  // tokens
  T range() const { return range_; }                  // the largest bias less the smallest

  void take_head(int64_t head) {
    // Reversed, so that its rows ascend with the key's coordinates.
    for (int64_t row = 0; row < a_.bias_size; ++row)
      table_[row] = ((const T*)a_.bias)[(a_.bias_size - 1 - row) * a_.heads + head];
    range_ = spread(table_, a_.bias_size);
    expanded_ = 0;
  }

  const T* biases(int kind) {
    T* to = biases_ + slice_[kind].at;
    // Whole vectors: what goes beyond a run is overwritten by the next one.
    if (!(expanded_ >> kind & 1))
      for_each_run<false>(slice_[kind], [&](int64_t at, int64_t row, int64_t length) {
        for (int64_t i = 0; i < length; i += kLanes<T>) store(to + at + i, load(table_ + row + i));
      });
    expanded_ |= 1 << kind;
    return to;
  }
  // Where the row of a query begins whose place is p in its slice, and whose slice is the d-th of the part.
  int64_t row(int kind, int64_t p, int64_t d) const {
    return (p * (2 * slices_ - 1) + slices_ - 1 - d) * slice_[kind].size();
  }

  void start_gradients() { summed_ = 0; }
  T* gradients(int kind) {
    T* sums = gradients_ + slice_[kind].at;
    if (!(summed_ >> kind & 1))
      for (int64_t i = 0; i < slice_[kind].rows * (2 * slices_ - 1) * slice_[kind].size(); ++i) sums[i] = 0;
    summed_ |= 1 << kind;
    return sums;
  }
  // Gives one head's gradients of the table.
  void finish_gradients(T* table) const {
    for (int64_t row = 0; row < a_.bias_size; ++row) sums_[row] = 0;
    // Whole vectors, of which those that follow each other have no row in common: a core waits for what it stored last.
    for (int k = 0; k < kKinds; ++k)
      if (summed_ >> k & 1)
        for_each_run<true>(slice_[k], [&](int64_t at, int64_t row, int64_t length) {
          const T* from = gradients_ + slice_[k].at + at;
          for (int64_t i = 0; i < length; i += kLanes<T>)
            store(sums_ + row + i, load(sums_ + row + i) + load_first(from + i, length - i));
        });
    for (int64_t row = 0; row < a_.bias_size; ++row) table[a_.bias_size - 1 - row] = sums_[row];
  }

 private:
  struct Slice {
    int64_t top, bottom, left, right;  // of the rectangle
    int64_t rows;                      // tokens of it that the window has
    int64_t at;                        // where its expansion begins
    int64_t size() const { return (bottom - top) * (right - left); }
  };

  // Of the table's slices; those of the window where there is no table.
  int64_t extent(int axis) const { return a_.bias_is_table ? a_.bias_extent[axis - 1] : a_.window[axis]; }
  int64_t first(int axis, Places places) const { return places == kAfter ? a_.first_late(axis) : 0; }
  int64_t last(int axis, Places places) const { return places == kBefore ? a_.first_late(axis) : extent(axis); }

  // Calls run(position in the expansion, row of the reversed table, length) for every contiguous run that both have in
  // common: by position for each query, or of all slices, then of the next line in them.
  template <bool Lines, class F>
  void for_each_run(const Slice& s, F run) const {
    struct Axis {
      int64_t count, at, row;  // steps from one to the next
    };
    const int64_t width = s.right - s.left, *w = a_.bias_window, line = 2 * w[2] - 1, slice = (2 * w[1] - 1) * line;
    const Axis slices{2 * slices_ - 1, s.size(), slice}, lines{s.bottom - s.top, width, line};
    const Axis outer = Lines ? lines : slices, inner = Lines ? slices : lines;
    for (int64_t p = 0; p < s.rows; ++p) {
      const int64_t at = p * slices.count * s.size();
      const int64_t row = (w[0] - slices_) * slice + (w[1] - 1 - p / width) * line + w[2] - 1 - p % width;
      for (int64_t o = 0; o < outer.count; ++o)
        for (int64_t i = 0; i < inner.count; ++i)
          run(at + o * outer.at + i * inner.at, row + o * outer.row + i * inner.row, width);
    }
  }

  const Window3dArgs& a_;
  const int64_t slices_;
  const bool has_parts_;  // whether the table's slices are the window's
  Slice slice_[kKinds];
  T range_ = 0;
  T *table_, *biases_, *gradients_ = nullptr, *sums_ = nullptr;
  int expanded_ = 0, summed_ = 0;  // bit per kind
};

}  // namespace VIDATTN_ISA
}  // namespace vidattn
