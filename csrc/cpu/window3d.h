// Shifted-window 3D attention on the CPU: one pass forward, one backward, for one instruction set.
//
// A task owns one head and one or more windows. Nothing is rolled, padded or partitioned: a window's tokens are found
// by index arithmetic, and attention.h does the rest.
//
// A window at a border of a shifted grid falls into parts, boxes of tokens that the mask keeps apart. Where no weight
// between two of them could be seen in the result, each part is a group of its own: of a window that is cut in two
// along each axis an eighth of the scores is left.
#pragma once
#include "attention.h"
#include "window3d_bias.h"
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
        arena_(base),
        windows_{{args, Engine::keys_in_tiles(n_), arena_}, {args, Engine::keys_in_tiles(n_), arena_}},
        engine_(n_, d_, args.scale, {args.dropout_p, args.seed}, backward, arena_),
        expanded_(args, backward && args.dbias_partial, kWidth, arena_) {
    for (int64_t** numbers : {&all_, &offset_in_all_, &part_keys_, &part_queries_, &offset_in_part_})
      *numbers = arena_.take<int64_t>(n_);
    tile_regions_ = arena_.take<int>(Engine::keys_in_tiles(n_) / kWidth);
    unmasked_ = arena_.take<bool>(Engine::keys_in_tiles(n_) / kWidth);
    if (a_.regions) mask_rows_ = arena_.take<T>(Engine::kRows * n_);
    if (has_dense_bias()) bias_ranges_ = arena_.take<T>(a_.types);
    if (backward) dpad_ = arena_.take<T>(2 * d_);
  }
  int64_t bytes() const { return arena_.used(); }

  void forward(int64_t begin, int64_t end) {
    number_tokens();
    if (begin < end) set_next(begin / a_.groups, begin % a_.groups);
    for (int64_t task = begin; task < end; ++task) {
      load_head(task / a_.groups);
      move_to_next();
      if (task + 1 < end) set_next((task + 1) / a_.groups, (task + 1) % a_.groups);
      find_rows(kOut);
      for_each_part([&] { engine_.forward(*this); });
    }
  }

  void backward(int64_t begin, int64_t end) {
    number_tokens();
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
        for_each_part([&] { engine_.backward(*this); });
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
      for (int64_t i = before_part_ + begin; i < before_part_ + end; ++i)
        fetch_row(next_rows_[slot].row(i), row_bytes());
  }

  int64_t position(int64_t query) const override { return query_at_[query]; }

  void describe(int64_t first, int64_t count, Query<T>* queries) const override {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = query_at_[first + r];
      const T* bias = bias_ ? bias_ + bias_offset_[i] : nullptr;
      queries[r] = {a_.bias_is_table ? bias : nullptr, a_.bias_is_table ? nullptr : bias,
                    in_parts_ ? nullptr : now_->mask_row(i, mask_rows_ + r * n_),
                    dbias_ ? dbias_ + bias_offset_[i] : nullptr};
    }
  }

  void keep_lse(int64_t first, int64_t count, const T* m, const T* total) const override {
    for (int64_t r = 0; r < count; ++r)
      ((T*)a_.lse)[now_->token(query_at_[first + r]) * a_.heads + this->head] = m[r] + log(total[r]);
  }

  void keys_packed() override {
    if (!has_regions()) return;
    longest_key_ = engine_.longest_key();
    for (int64_t j = 0; j < n_; ++j) {
      if (j % kWidth == 0) tile_regions_[j / kWidth] = 0;
      tile_regions_[j / kWidth] |= 1 << now_->region(j);
    }
  }

  // Of a window that is not cut into parts: tiles of other regions alone are left out where that cannot be seen. A tile
  // whose keys and queries all lie in one region has no mask.
  void choose_tiles(int64_t first, int64_t count, Tiles& tiles) override {
    if (!has_regions()) return;
    int regions = 0;  // bit per region of the queries
    for (int64_t r = 0; r < count; ++r) regions |= 1 << now_->region(query_at_[first + r]);
    const bool one_region = !(regions & (regions - 1));
    for (int64_t tile = 0; tile < tiles.last; ++tile) unmasked_[tile] = one_region && tile_regions_[tile] == regions;
    tiles.unmasked = unmasked_;
    if (!unseen(engine_.longest_query(count), longest_key_)) return;
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
  int64_t position(Slot slot, int64_t n) const { return is_of_keys(slot) ? key_at_[n] : query_at_[n]; }

  // Whether the weights that the mask leaves cannot be seen in the result, given the squares of the largest |q| and
  // |k|: a masked key's score is at most 2 max|q| max|k| + (bias range) + mask_value above that of the query itself,
  // and at -40 its weight is e^-40 = 4e-18 of the largest. float64 could see it. False for NaN.
  bool unseen(T query, T key) const {
    const T score = T(__builtin_sqrt(query * key)) * T(__builtin_fabs(a_.scale));
    return 2 * score + bias_range_ < T(-40 - a_.mask_value) && (sizeof(T) == 4 || a_.mask_value == -__builtin_inf());
  }

  // Square of the length of the window's longest row; NaN where one is not finite.
  T longest_row(Slot slot) const {
    constexpr int step = kLanes<T> * P::pack;
    T longest = 0, total = 0;
    for (int64_t i = 0; i < n_; ++i) {
      alignas(64) Value spare[kMaxDim];
      const Value* row = read_row<P>(a_.element, rows_[slot].row(i), d_, spare);
      Vec<T> squares{};
      for (int64_t c = 0; c < d_; c += step) {
        const auto words = P::load_words(row + c, d_ - c);
        squares = P::multiply_add(words, words, squares);
      }
      const T length = sum<T>(squares);
      longest = length > longest ? length : longest;
      total += length;
    }
    return longest + 0 * total;
  }

  // Runs body for the window, or for each of its parts.
  template <class F>
  void for_each_part(F body) {
    before_part_ = 0;
    in_parts_ = now_->border() && !a_.mask && a_.dropout_p == 0 && !has_dense_bias() && expanded_.has_parts() &&
                unseen(longest_row(kQ), longest_row(kK));
    if (!in_parts_) {
      this->keys = n_, this->queries = now_->query_count();
      key_at_ = all_, query_at_ = now_->queries();
      if (!has_dense_bias()) use_bias(0, offset_in_all_);
      body();
      return;
    }
    for (int part = 0; part < 8; ++part) {
      if (part & ~now_->border()) continue;
      find_part(part);
      if (this->queries > 0) body();
      before_part_ += this->keys;
    }
  }

  // A bit per axis: whether the part lies after the axis' border.
  void find_part(int part) {
    using Bias = ExpandedBias<T>;
    typename Bias::Places places[3];
    int64_t first[3], last[3];
    for (int axis = 0; axis < 3; ++axis) {
      const bool after = part >> axis & 1;
      places[axis] = !(now_->border() >> axis & 1) ? Bias::kAll : after ? Bias::kAfter : Bias::kBefore;
      first[axis] = places[axis] == Bias::kAfter ? a_.first_late(axis) : 0;
      last[axis] = places[axis] == Bias::kBefore ? a_.first_late(axis) : a_.window[axis];
    }
    const int kind = Bias::kind(places[1], places[2]);
    this->keys = this->queries = 0;
    for (int64_t x = first[0]; x < last[0]; ++x)
      for (int64_t y = first[1], place = 0; y < last[1]; ++y)
        for (int64_t z = first[2]; z < last[2]; ++z, ++place) {
          const int64_t i = (x * a_.window[1] + y) * a_.window[2] + z;
          offset_in_part_[i] = expanded_.row(kind, place, x - first[0]);
          part_keys_[this->keys++] = i;
          if (now_->real(i)) part_queries_[this->queries++] = i;
        }
    key_at_ = part_keys_, query_at_ = part_queries_;
    use_bias(kind, offset_in_part_);
  }

  void use_bias(int kind, const int64_t* offsets) {
    bias_offset_ = offsets;
    if (!a_.bias_is_table) return;
    bias_ = expanded_.biases(kind);
    if (a_.dbias_partial) dbias_ = expanded_.gradients(kind);
  }

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
    this->index = now_->group();
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

  int64_t chunk_begin(int64_t chunk) const {
    return a_.chunk_begin ? a_.chunk_begin[chunk] : a_.groups * chunk / a_.chunks;
  }
  int64_t group_at(int64_t place) const { return a_.order ? a_.order[place] : place; }
  int64_t first_group(int64_t task) const { return group_at(chunk_begin(task % a_.chunks)); }

  void number_tokens() {
    for (int64_t i = 0; i < n_; ++i) {
      all_[i] = i;
      offset_in_all_[i] = has_dense_bias() ? i * n_ : expanded_.row(0, i % expanded_.slice(), i / expanded_.slice());
    }
    bias_offset_ = offset_in_all_;
  }

  void load_head(int64_t head) {
    if (head == loaded_head_) return;
    this->head = loaded_head_ = head;
    bias_ = nullptr;
    for (int64_t type = 0; has_dense_bias() && type < a_.types; ++type) bias_ranges_[type] = -1;  // not known yet
    if (!a_.bias_is_table) return;
    expanded_.take_head(head);
    bias_range_ = expanded_.range();
  }

  bool has_regions() const { return now_->has_regions() && !a_.mask && !in_parts_; }

  void start_gradients(int64_t chunk) {
    dbias_ = nullptr;
    if (a_.dbias_partial) {
      T* partial = (T*)a_.dbias_partial + (chunk * a_.heads + this->head) * a_.bias_size;
      if (a_.bias_is_table)
        expanded_.start_gradients();
      else
        for (int64_t i = 0; i < a_.bias_size; ++i) partial[i] = 0;
      dbias_ = partial;
    }
    for (int64_t c = 0; c < 2 * d_; ++c) dpad_[c] = 0;
  }

  void finish_gradients(int64_t chunk) {
    if (a_.dbias_partial && a_.bias_is_table) {
      expanded_.finish_gradients((T*)a_.dbias_partial + (chunk * a_.heads + this->head) * a_.bias_size);
    }
    if (a_.dpad_partial) {
      T* partial = (T*)a_.dpad_partial + (chunk * a_.heads + this->head) * 2 * d_;
      for (int64_t c = 0; c < 2 * d_; ++c) partial[c] = dpad_[c];
    }
  }

  const Window3dArgs& a_;
  const int64_t n_, d_;
  Arena arena_;
  WindowTokens<T> windows_[2], *now_ = &windows_[0], *next_ = &windows_[1];
  Engine engine_;
  ExpandedBias<T> expanded_;
  bool has_next_ = false;
  int64_t loaded_head_ = -1;
  Rows rows_[kSlots], next_rows_[kDout + 1];  // of this window and head, of the next ones
  const T* bias_ = nullptr;                   // of the current head
  T bias_range_ = 0;
  T longest_key_ = 0;  // square of the largest |k| of the window

  // Of the window or the part in work: its tokens, those that are queries, and by token where its row of biases begins.
  const int64_t *key_at_, *query_at_, *bias_offset_;
  bool in_parts_ = false;
  int64_t before_part_ = 0;  // tokens in the parts before
  int64_t *all_, *offset_in_all_, *part_keys_, *part_queries_, *offset_in_part_;

  T *dbias_ = nullptr, *dpad_ = nullptr;  // gradients of bias_ and of pad_qkv
  int* tile_regions_;                     // [tile]: bit per region of its keys
  bool* unmasked_;                        // [tile]: for the queries in work
  T* mask_rows_ = nullptr;                // [query in work][key]: masks of the caller's regions
  T* bias_ranges_ = nullptr;              // [type]: of a dense bias, for the current head; negative: not known
};

template <class P>
constexpr Window3dKernels window3d_kernels() {
  return kernels_of<P, Window3d<P>, Window3dArgs>();
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
