// Shifted-window 3D attention on the CPU: one pass forward, one backward, for one instruction set.
//
// A task owns one head and one or more windows. Nothing is rolled, padded or partitioned: a window's tokens are found
// by index arithmetic, and attention.h does the rest.
//
// The bias of a query row is one contiguous run of an expanded table. With P tokens to a (height, width) slice, the
// pair (i, j) depends on the slices of i and j only through their difference, so expanded[p_i][(d_j - d_i + slices - 1)
// * P + p_j] holds every row of the window at offset (slices - 1 - d_i) * P: (2 * slices - 1) * P^2 entries instead of
// (slices * P)^2. The bias gradient is summed in the same layout.
#pragma once
#include "attention.h"
#include "window3d_kernels.h"
#include "window3d_tokens.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P>
class Window3d final : public Group<P> {
  using T = typename P::Acc;
  using Value = typename P::Value;
  using Engine = Attention<P>;
  static constexpr int kWidth = Engine::kWidth;

 public:
  // Lays out the scratch memory; with base == nullptr only bytes() may be called.
  Window3d(const Window3dArgs& args, bool backward, char* base)
      : a_(args),
        n_(args.tokens),
        d_(args.head_dim),
        slice_(args.bias_is_table ? args.bias_extent[0] * args.bias_extent[1] : n_),
        slices_(ceil_div(n_, slice_)),
        arena_(base),
        windows_{{args, Engine::keys_in_tiles(n_), arena_}, {args, Engine::keys_in_tiles(n_), arena_}},
        engine_(n_, d_, args.scale, {args.dropout_p, args.seed}, backward, arena_) {
    bias_offset_ = arena_.take<int64_t>(n_);
    expanded_size_ = a_.bias_is_table ? (slice_ < n_ ? slice_ : n_) * (2 * slices_ - 1) * slice_ : 0;
    if (a_.bias_is_table) {
      table_ = arena_.take<T>(a_.bias_size);
      expanded_ = arena_.take<T>(expanded_size_ + kWidth);  // the last tile of a row reads on
    }
    tile_regions_ = arena_.take<int>(engine_.tiles());
    unmasked_ = arena_.take<bool>(engine_.tiles());
    if (a_.regions) mask_rows_ = arena_.take<T>(Engine::kRows * n_);
    if (has_dense_bias()) bias_ranges_ = arena_.take<T>(a_.types);
    if (!backward) return;
    if (a_.dbias_partial && a_.bias_is_table) dexpanded_ = arena_.take<T>(expanded_size_);
    dpad_ = arena_.take<T>(2 * d_);
  }
  int64_t bytes() const { return arena_.used(); }

  void forward(int64_t begin, int64_t end) {
    fill_bias_offsets();
    if (begin < end) set_next(begin / a_.groups, begin % a_.groups);
    for (int64_t task = begin; task < end; ++task) {
      load_head(task / a_.groups);
      move_to_next();
      if (task + 1 < end) set_next((task + 1) / a_.groups, (task + 1) % a_.groups);
      find_rows(kOut);
      engine_.forward(*this);
    }
  }

  void backward(int64_t begin, int64_t end) {
    fill_bias_offsets();
    if (begin < end) set_next(begin / a_.chunks, first_group(begin));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / a_.chunks, chunk = task % a_.chunks, last = chunk_begin(chunk + 1);
      load_head(head);
      start_gradients(chunk);
      for (int64_t place = chunk_begin(chunk); place < last; ++place) {
        move_to_next();
        if (place + 1 < last)
          set_next(head, group_at(place + 1));
        else if (task + 1 < end)
          set_next((task + 1) / a_.chunks, first_group(task + 1));
        for (Slot slot : {kDout, kDq, kDk, kDv}) find_rows(slot);
        engine_.backward(*this);
      }
      finish_gradients(chunk);
    }
  }

  // ---- What attention.h asks for ----

  void read(Slot slot, int64_t first, int64_t count, const Value** rows, Value* spare) const override {
    for (int64_t r = 0; r < count; ++r)
      rows[r] = read_row<P>(a_.element, rows_[slot].row(position(slot, first + r)), d_, spare + r * kMaxDim);
  }

  void write(Slot slot, int64_t first, int64_t count, const T* from, int64_t step, T factor) override {
    for (int64_t r = 0; r < count; ++r, from += step) {
      if (is_of_keys(slot) && r + 8 < count) fetch_to_write(slot, first + r + 8, 1);
      const int64_t i = position(slot, first + r);
      if (now_->real(i)) {
        write_row<P>(a_.element, from, factor, rows_[slot].row(i), d_);
        continue;
      }
      T* to = dpad_ + (slot == kDv ? d_ : 0);  // padding is no query: only keys and values have gradients
      for (int64_t c = 0; c < d_; ++c) to[c] += from[c] * factor;
    }
  }

  void fetch_to_write(Slot slot, int64_t first, int64_t count) const override {
    for (int64_t n = first; n < first + count; ++n) {
      const int64_t i = position(slot, n);
      if (now_->real(i)) fetch_row<true>(rows_[slot].row(i), row_bytes());
    }
  }

  // The window after the current one is known in advance, so that its rows can be fetched while the current one is
  // computed: they are short (one head) and far apart, which no hardware prefetcher foresees.
  void fetch_next(int64_t begin, int64_t end, Slot last) const override {
    if (!has_next_) return;
    for (int slot = kQ; slot <= last; ++slot)
      for (int64_t i = begin; i < end; ++i) fetch_row(next_rows_[slot].row(i), row_bytes());
  }

  int64_t position(int64_t query) const override { return now_->query(query); }

  void describe(int64_t first, int64_t count, Query<T>* queries) const override {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = now_->query(first + r);
      const T* bias = bias_ ? bias_ + bias_offset_[i] : nullptr;
      queries[r] = {a_.bias_is_table ? bias : nullptr, a_.bias_is_table ? nullptr : bias,
                    now_->mask_row(i, mask_rows_ + r * n_), dbias_ ? dbias_ + bias_offset_[i] : nullptr};
    }
  }

  void keep_lse(int64_t first, int64_t count, const T* m, const T* total) const override {
    for (int64_t r = 0; r < count; ++r)
      ((T*)a_.lse)[now_->token(now_->query(first + r)) * a_.heads + this->head] = m[r] + log(total[r]);
  }

  void keys_packed() override {
    if (!has_regions()) return;
    longest_key_ = engine_.longest_key();
    for (int64_t j = 0; j < n_; ++j) {
      if (j % kWidth == 0) tile_regions_[j / kWidth] = 0;
      tile_regions_[j / kWidth] |= 1 << now_->region(j);
    }
  }

  // Tiles of other regions alone are left out where that cannot be seen in the result: a masked key's score is at most
  // 2 max|q| max|k| + (bias range) + mask_value above that of the query itself, and at -40 its weight is e^-40 = 4e-18
  // of the largest. float64 could see it. A tile whose keys and queries all lie in one region has no mask.
  void choose_tiles(int64_t first, int64_t count, Tiles& tiles) override {
    if (!has_regions()) return;
    int regions = 0;  // bit per region of the queries
    for (int64_t r = 0; r < count; ++r) regions |= 1 << now_->region(now_->query(first + r));
    const bool one_region = !(regions & (regions - 1));
    for (int64_t tile = 0; tile < tiles.last; ++tile) unmasked_[tile] = one_region && tile_regions_[tile] == regions;
    tiles.unmasked = unmasked_;
    const T score = T(__builtin_sqrt(engine_.longest_query(count) * longest_key_)) * T(__builtin_fabs(a_.scale));
    const bool unseen = 2 * score + bias_range_ < T(-40 - a_.mask_value);  // false for NaN
    if (!unseen || (sizeof(T) == 8 && a_.mask_value != -__builtin_inf())) return;
    while (!(tile_regions_[tiles.first] & regions)) ++tiles.first;
    while (!(tile_regions_[tiles.last - 1] & regions)) --tiles.last;
  }

 private:
  // One head of a token tensor within a window: padding tokens share a row.
  struct Rows {
    char* base;
    const int64_t* offset;
    const WindowTokens<T>* window;
    char* pad;
    char* row(int64_t i) const { return window->real(i) ? base + offset[i] : pad; }
  };

  Rows rows(Slot slot, WindowTokens<T>& window, int64_t head) const {
    const bool padded = a_.pad_qkv && slot <= kV;
    const char* pad = padded ? a_.pad_qkv + (slot * a_.heads + head) * row_bytes() : kZeros;
    return {a_.tensor[slot].data + head * a_.tensor[slot].stride[4], window.offsets(slot), &window,
            const_cast<char*>(pad)};
  }
  void find_rows(Slot slot) { rows_[slot] = rows(slot, *now_, this->head); }
  int64_t row_bytes() const { return d_ * bytes_of(a_.element); }
  int64_t position(Slot slot, int64_t n) const { return is_of_keys(slot) ? n : position(n); }

  void set_next(int64_t head, int64_t group) {
    next_->load(group);
    for (Slot slot : {kQ, kK, kV}) next_rows_[slot] = rows(slot, *next_, head);
    if (a_.tensor[kDout].data) next_rows_[kDout] = rows(kDout, *next_, head);
    has_next_ = true;
  }
  void move_to_next() {
    WindowTokens<T>* window = now_;
    now_ = next_, next_ = window;
    has_next_ = false;
    this->queries = now_->query_count(), this->index = now_->group();
    for (Slot slot : {kQ, kK, kV}) find_rows(slot);
    if (has_dense_bias()) find_dense_bias();
  }

  bool has_dense_bias() const { return a_.bias && !a_.bias_is_table; }

  // That of the window's type; how far apart its numbers are is asked for at borders alone.
  void find_dense_bias() {
    const int64_t type = a_.window_types ? a_.window_types[this->index % a_.type_groups] : 0;
    bias_ = (const T*)a_.bias + (type * a_.heads + this->head) * a_.bias_size;
    if (!has_regions()) return;
    T& range = bias_ranges_[type];
    if (range < 0) range = spread(bias_, a_.bias_size);
    bias_range_ = range;
  }

  // The largest number less the smallest.
  static T spread(const T* from, int64_t count) {
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

  int64_t chunk_begin(int64_t chunk) const {
    return a_.chunk_begin ? a_.chunk_begin[chunk] : a_.groups * chunk / a_.chunks;
  }
  int64_t group_at(int64_t place) const { return a_.order ? a_.order[place] : place; }
  int64_t first_group(int64_t task) const { return group_at(chunk_begin(task % a_.chunks)); }

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
    if (head == loaded_head_) return;
    this->head = loaded_head_ = head;
    bias_ = nullptr;
    for (int64_t type = 0; has_dense_bias() && type < a_.types; ++type) bias_ranges_[type] = -1;  // not known yet
    if (!a_.bias_is_table) return;
    for (int64_t row = 0; row < a_.bias_size; ++row)
      table_[row] = ((const T*)a_.bias)[(a_.bias_size - 1 - row) * a_.heads + head];
    bias_range_ = spread(table_, a_.bias_size);
    for_each_run([&](int64_t to, int64_t row, int64_t length) {
      for (int64_t i = 0; i < length; ++i) expanded_[to + i] = table_[row + i];
    });
    bias_ = expanded_;
  }

  bool has_regions() const { return now_->has_regions() && !a_.mask; }

  void start_gradients(int64_t chunk) {
    dbias_ = nullptr;
    if (a_.dbias_partial) {
      T* partial = (T*)a_.dbias_partial + (chunk * a_.heads + this->head) * a_.bias_size;
      for (int64_t i = 0; i < a_.bias_size; ++i) partial[i] = 0;
      dbias_ = a_.bias_is_table ? dexpanded_ : partial;
      for (int64_t i = 0; i < (a_.bias_is_table ? expanded_size_ : 0); ++i) dexpanded_[i] = 0;
    }
    for (int64_t c = 0; c < 2 * d_; ++c) dpad_[c] = 0;
  }

  void finish_gradients(int64_t chunk) {
    if (a_.dbias_partial && a_.bias_is_table) {
      T* partial = (T*)a_.dbias_partial + (chunk * a_.heads + this->head) * a_.bias_size;
      T* reversed_end = partial + a_.bias_size - 1;
      for_each_run([&](int64_t from, int64_t row, int64_t length) {
        for (int64_t i = 0; i < length; ++i) reversed_end[-(row + i)] += dexpanded_[from + i];
      });
    }
    if (a_.dpad_partial) {
      T* partial = (T*)a_.dpad_partial + (chunk * a_.heads + this->head) * 2 * d_;
      for (int64_t c = 0; c < 2 * d_; ++c) partial[c] = dpad_[c];
    }
  }

  const Window3dArgs& a_;
  const int64_t n_, d_, slice_, slices_;
  Arena arena_;
  WindowTokens<T> windows_[2], *now_ = &windows_[0], *next_ = &windows_[1];
  Engine engine_;
  int64_t expanded_size_;
  bool has_next_ = false;
  int64_t loaded_head_ = -1;
  Rows rows_[kSlots], next_rows_[kDout + 1];  // of this window and head, of the next ones
  const T* bias_ = nullptr;                   // of the current head
  T bias_range_ = 0;
  T longest_key_ = 0;  // square of the largest |k| of the window

  int64_t* bias_offset_;                      // [query]: start of its row in bias_ and dbias_
  T *table_ = nullptr, *expanded_ = nullptr;  // one head's table, reversed; and expanded
  T *dexpanded_ = nullptr, *dpad_ = nullptr;  // gradients of the expanded table and of pad_qkv
  T* dbias_ = nullptr;
  int* tile_regions_;         // [tile]: bit per region of its keys
  bool* unmasked_;            // [tile]: for the queries in work
  T* mask_rows_ = nullptr;    // [query in work][key]: masks of the caller's regions
  T* bias_ranges_ = nullptr;  // [type]: of a dense bias, for the current head; negative: not known
};

template <class P>
constexpr Window3dKernels window3d_kernels() {
  return kernels_of<Window3d<P>, Window3dArgs>();
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
