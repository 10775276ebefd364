// Attention in short sequences: bound by memory, so q, k, v (and the gradient of the context) are read once, where they
// lie, and each result is written once.
//
// A score is a product of two rows with the channels in lanes. The sums across the lanes of as many products as a
// vector has lanes are taken together, by a tree of exchanges, and come out as one vector: the scores of a sequence of
// 8 are 4 vectors of 16. All heads of a sequence follow each other, so that whole rows of the token tensors are used.
//
// A cls token is no row of these, or 8 frames would need the matrix of 16. Its key has a column of scores apart, and
// its query, which sees the whole clip, comes with weights: a row apart.
#pragma once
#include "divided_cls.h"

namespace vidattn {
namespace VIDATTN_ISA {

// Lane l of the result is the sum over the lanes of rows[l].
template <int W, class T>
VIDATTN_INLINE Vec<T> add_across(Vec<T>* rows) {
  if constexpr (W < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i += 2 * W) {
      exchange<W, T>(rows[i], rows[i + W], std::make_integer_sequence<int, kLanes<T>>());
      rows[i] += rows[i + W];
    }
    return add_across<2 * W, T>(rows);
  }
  return rows[0];
}

// Long sequences are bound by arithmetic, and have nothing from it.
VIDATTN_INLINE bool streams_result(const DividedArgs& a, Slot slot) {
  return a.patches <= 64 && streams(a.tensor[slot], a.batch * a.rows(), a.head_dim * bytes_of(a.element));
}

// Sequences of up to L patches; L is a power of two. Missing rows are zeros.
template <class P, class In, int L, bool Cls>
class ShortSequences {
  using T = typename P::Acc;
  static constexpr int kVectors = L * L / kLanes<T>;                 // of an (L, L) matrix of scores
  static constexpr int kPerRow = L > kLanes<T> ? L / kLanes<T> : 1;  // or several rows a vector:
  static constexpr int kRowsTogether = kLanes<T> > L ? kLanes<T> / L : 1;
  static constexpr int kRun = L < kLanes<T> ? L : kLanes<T>;             // lanes of a row in a vector
  static constexpr int kTogether = kVectorBytes == 64 || L < 8 ? L : 8;  // rows of a product that is summed over rows

 public:
  explicit ShortSequences(const DividedArgs& args)
      : a_(args),
        n_(args.patches),
        d_(args.head_dim),
        vectors_(ceil_div(n_, kRowsTogether) * kPerRow),
        dropout_{args.dropout_p, args.seed} {
    for (int j = 0; j < L || j < kLanes<T>; ++j) beyond_[j] = j % L < n_ ? T(0) : -T(__builtin_inf());
    for (int slot = kOut; slot < kSlots; ++slot) streams_[slot] = streams_result(a_, Slot(slot));
    for (auto& row : from_)
      for (auto& p : row) p = (const In*)kZeros;
    for (auto& row : to_)
      for (auto& p : row) p = unused_;
    for (int i = 0; i < L * L; ++i) weights_[i] = gradients_[i] = keep_[i] = 0;
    for (int i = 0; i < (Cls ? L * L : 0); ++i) keep_cls_[i] = 0;
    for (int i = 0; i < kRowLength; ++i) scores_of_cls_[i] = row_weights_[i] = row_gradients_[i] = 0;
  }

  void run(bool backward, int64_t begin, int64_t end) {
    next_ = place(begin, a_.first_head);
    for (int64_t group = begin; group < end; ++group)
      for (int64_t head = a_.first_head; head < a_.first_head + a_.num_heads; ++head) {
        now_ = next_;
        if (head + 1 < a_.first_head + a_.num_heads)
          ++next_.head;
        else if (group + 1 < end)
          next_ = place(group + 1, a_.first_head);
        for (Slot slot : {kQ, kK, kV}) read_rows(slot);
        if constexpr (Cls) read_weights_of_cls(backward, group);
        if (dropout_.p > 0) draw_factors(group);
        if (backward)
          differentiate();
        else
          attend();
      }
  }

 private:
  void attend() {
    start_results(kOut, to_[0]);
    Vec<T> p[kVectors], p_cls[kVectors];
    products(kQ, kK, p, kQ, kV);
    if constexpr (Cls) products_with_cls(kQ, kK, p_cls);
    softmax(p, p_cls);
    for (int64_t w = 0; w < vectors_; ++w) {
      if (dropout_.p > 0) p[w] *= load(keep_ + w * kLanes<T>);
      store(weights_ + w * kLanes<T>, p[w]);
      if constexpr (Cls) store(column_weights_ + w * kLanes<T>, drop(p_cls[w], w));
    }
    sums<L, 1>(weights_, from_[kV], to_[0], {column_weights_, cls_[kV], row_weights_, share(a_.cls_out, 0)});
    finish_results(kOut);
  }

  void differentiate() {
    read_rows(kDout);
    Vec<T> p[kVectors], g[kVectors], p_cls[kVectors], g_cls[kVectors];
    start_results(kDq, to_[0]);
    products(kQ, kK, p, kQ, kK);
    if constexpr (Cls) products_with_cls(kQ, kK, p_cls);
    softmax(p, p_cls);
    start_results(kDk, to_[1]);
    products(kDout, kV, g, kV, kDout);
    if constexpr (Cls) products_with_cls(kDout, kV, g_cls);
    start_results(kDv, to_[2]);
    for (int64_t w = 0; w < vectors_; w += kPerRow) {
      Vec<T> delta{};
      for (int64_t i = w; i < w + kPerRow; ++i) {
        if (dropout_.p > 0) g[i] *= load(keep_ + i * kLanes<T>);
        delta += p[i] * g[i];
      }
      delta = reduce_runs<kRun, T>(delta, [](Vec<T> a, Vec<T> b) { return a + b; });
      if constexpr (Cls) {
        g_cls[w] = drop(g_cls[w], w);
        delta += p_cls[w] * g_cls[w];
        store(column_gradients_ + w * kLanes<T>, p_cls[w] * (g_cls[w] - delta) * T(a_.scale));
        store(column_weights_ + w * kLanes<T>, drop(p_cls[w], w));
      }
      for (int64_t i = w; i < w + kPerRow; ++i) {
        store(gradients_ + i * kLanes<T>, p[i] * (g[i] - delta) * T(a_.scale));
        if (dropout_.p > 0) p[i] *= load(keep_ + i * kLanes<T>);
        store(weights_ + i * kLanes<T>, p[i]);
      }
    }
    T* const shares[] = {share(a_.cls_gradients, 0), share(a_.cls_gradients, 1), share(a_.cls_gradients, 2)};
    sums<L, 1>(gradients_, from_[kK], to_[0], {column_gradients_, cls_[kK], row_gradients_, shares[0]});
    finish_results(kDq);
    sums<1, L>(gradients_, from_[kQ], to_[1], {row_gradients_, cls_[kQ], column_gradients_, shares[1]});
    finish_results(kDk);
    sums<1, L>(weights_, from_[kDout], to_[2], {row_weights_, cls_[kDout], column_weights_, shares[2]});
    finish_results(kDv);
  }

  // s[i][j] = sum over the channels of a[i] b[j]. On the way, rows of the next head are fetched from the tensors
  // first .. last: a core can wait for few rows at a time.
  VIDATTN_INLINE void products(Slot a, Slot b, Vec<T>* s, int first, int last) const {
    constexpr int step = kLanes<T> * P::pack;
    const int64_t d = d_;
    for (int64_t w = 0; w < vectors_; ++w) {
      const In *const *row = from_[a] + w * kLanes<T> / L, *const *column = from_[b] + w * kLanes<T> % L;
      for (int slot = first; slot <= last; ++slot) fetch_next(Slot(slot), n_ * w / vectors_, n_ * (w + 1) / vectors_);
      Vec<T> partial[kLanes<T>] = {};
      const auto add = [&](int64_t c, int64_t left) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int l = 0; l < kLanes<T>; ++l)
          partial[l] =
              P::multiply_add(P::load_words(row[l / L] + c, left), P::load_words(column[l % L] + c, left), partial[l]);
      };
      int64_t c = 0;
      for (; c + step <= d; c += step) add(c, step);
      if (c < d) add(c, d - c);
      s[w] = add_across<1, T>(partial);
    }
  }

  // The same with the row of the cls token, each in all lanes of its row of scores.
  VIDATTN_INLINE void products_with_cls(Slot a, Slot b, Vec<T>* s) {
    for (int64_t i = 0; i < n_; ++i) scores_of_cls_[i] = dot<P>(from_[a][i], cls_[b], d_);
    for (int64_t w = 0; w < vectors_; ++w)
      s[w] = spread<T>(load(scores_of_cls_ + w * kLanes<T> / L), std::make_integer_sequence<int, kLanes<T>>());
  }
  template <class U, int... Lane>
  static VIDATTN_INLINE Vec<U> spread(Vec<U> v, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(v, v, (Lane / L)...);
  }
  VIDATTN_INLINE Vec<T> drop(Vec<T> of_cls, int64_t w) const {
    return dropout_.p > 0 ? of_cls * load(keep_cls_ + w * kLanes<T>) : of_cls;
  }

  // Weights of the rows of scores.
  VIDATTN_INLINE void softmax(Vec<T>* s, Vec<T>* s_cls) const {
    for (int64_t w = 0; w < vectors_; w += kPerRow) {
      Vec<T> top = splat(-T(__builtin_inf())), total{};
      if constexpr (Cls) top = s_cls[w] *= T(a_.scale);
      for (int i = 0; i < kPerRow; ++i) {
        s[w + i] = s[w + i] * T(a_.scale) + load(beyond_ + i * kLanes<T>);
        top = max<T>(top, s[w + i]);
      }
      top = reduce_runs<kRun, T>(top, [](Vec<T> a, Vec<T> b) { return max<T>(a, b); });
      for (int i = 0; i < kPerRow; ++i) total += s[w + i] = exp<typename P::Exp, T>(s[w + i] - top);
      total = reduce_runs<kRun, T>(total, [](Vec<T> a, Vec<T> b) { return a + b; });
      if constexpr (Cls) total += s_cls[w] = exp<typename P::Exp, T>(s_cls[w] - top);
      const Vec<T> inverse = T(1) / total;
      for (int i = 0; i < kPerRow; ++i) s[w + i] *= inverse;
      if constexpr (Cls) s_cls[w] *= inverse;
    }
  }

  // The cls token's part in sums of rows: its row with weights by a, and by b the weights of a sum for the token.
  struct ClsPart {
    const T* by_a;
    const In* from;
    const T* by_b;
    T* to;
  };

  // to[a] = sum over b of w[a * AStep + b * BStep] from[b].
  template <int AStep, int BStep>
  VIDATTN_INLINE void sums(const T* w, const In* const* from, In* const* to, const ClsPart& cls) const {
    if (n_ == L)
      sums<AStep, BStep>(w, from, to, cls, std::integral_constant<int, L>());
    else
      sums<AStep, BStep>(w, from, to, cls, n_);
  }
  template <int AStep, int BStep, class Count>
  VIDATTN_INLINE void sums(const T* w, const In* const* from, In* const* to, const ClsPart& cls, Count rows) const {
    const int64_t d = d_;
    const auto column = [&](int64_t c, int64_t left) __attribute__((always_inline)) {
      for (int first = 0; first < rows; first += kTogether) {
        Vec<T> total[kTogether] = {}, for_cls{};
        for (int b = 0; b < rows; ++b) {
          const Vec<T> x = load_wide<T>(from[b] + c, left);
#pragma GCC unroll 16
          for (int a = 0; a < kTogether; ++a) total[a] += splat(w[(first + a) * AStep + b * BStep]) * x;
          if constexpr (Cls) for_cls += splat(cls.by_b[b * BStep]) * x;
        }
        if constexpr (Cls) {
          const Vec<T> x = load_wide<T>(cls.from + c, left);
#pragma GCC unroll 16
          for (int a = 0; a < kTogether; ++a) total[a] += splat(cls.by_a[(first + a) * AStep]) * x;
          if (first == 0) store_first(cls.to + c, for_cls, left);
        }
#pragma GCC unroll 16
        for (int a = 0; a < kTogether; ++a) store_narrow<T>(to[first + a] + c, total[a], left);
      }
    };
    int64_t c = 0;
    for (; c + kLanes<T> <= d; c += kLanes<T>) column(c, kLanes<T>);
    if (c < d) column(c, d - c);
  }

  VIDATTN_INLINE void draw_factors(int64_t group) {
    for (int64_t i = 0; i < n_; ++i) {
      if constexpr (!Cls) {
        dropout_.factors(0, round_up(n_, 4), i, now_.head, group, keep_ + i * L);
        continue;
      }
      T factors[L + 4];  // the cls token is position 0
      dropout_.factors(0, round_up(1 + n_, 4), 1 + i, now_.head, group, factors);
      for (int64_t j = 0; j < n_; ++j) keep_[i * L + j] = factors[1 + j];
      for (int64_t j = 0; j < L; ++j) keep_cls_[i * L + j] = factors[0];
    }
  }

  VIDATTN_INLINE void read_weights_of_cls(bool backward, int64_t group) {
    for (Slot slot : {kQ, kK, kV}) cls_[slot] = (const In*)cls_row(a_, slot, now_.clip, now_.head);
    if (backward) cls_[kDout] = (const In*)cls_row(a_, kDout, now_.clip, now_.head);
    for (int gradients = 0; gradients <= backward; ++gradients) {
      const T* from = cls_weights<T>(a_, gradients, now_.clip, now_.head) + first_row_of(a_, group);
      T* to = gradients ? row_gradients_ : row_weights_;
      for (int64_t i = 0; i < n_; ++i) to[i] = from[i * a_.position_step];
    }
  }
  VIDATTN_INLINE T* share(void* shares, int64_t which) const {
    if constexpr (!Cls) return nullptr;
    return share_of_group<T>(a_, shares, which, now_.group, now_.head);
  }

  struct Place {
    int64_t clip, row, head, group;
  };
  Place place(int64_t group, int64_t head) const {
    return {group / a_.groups, group % a_.groups * a_.group_step, head, group};
  }
  VIDATTN_INLINE char* first_row(Slot slot, const Place& at) const {
    const RowTensor& t = a_.tensor[slot];
    return t.data + at.clip * t.stride[0] + at.row * t.stride[1] + at.head * t.stride[2];
  }
  VIDATTN_INLINE int64_t row_step(Slot slot) const { return a_.position_step * a_.tensor[slot].stride[1]; }
  template <class Row>
  VIDATTN_INLINE void find_rows(Slot slot, Row** rows) const {
    char* row = first_row(slot, now_);
    for (int64_t i = 0; i < n_; ++i) rows[i] = (Row*)(row + i * row_step(slot));
  }

  // Rows a multiple of 4 KB apart fall into one set of the first cache, which has room for 8 to 12 of them. More of
  // them are copied to where they lie next to each other.
  VIDATTN_INLINE void read_rows(Slot slot) {
    find_rows(slot, from_[slot]);
    if (n_ <= 12 || row_step(slot) % 4096 != 0) return;
    for (int64_t i = 0; i < n_; ++i) {
      In* copy = copies_[slot] + i * d_;
      for (int64_t c = 0; c < d_; ++c) copy[c] = from_[slot][i][c];
      from_[slot][i] = copy;
    }
  }

  // Where rows of a result are written to: fetched, or set aside until whole lines of them can be streamed.
  VIDATTN_INLINE void start_results(Slot slot, In** rows) {
    if (streams_[slot]) {
      for (int64_t i = 0; i < n_; ++i) rows[i] = results_ + i * d_;
    } else {
      find_rows(slot, rows);
      for (int64_t i = 0; i < n_; ++i) fetch_row<true>((const char*)rows[i], d_ * int64_t(sizeof(In)));
    }
  }
  VIDATTN_INLINE void finish_results(Slot slot) const {
    if (!streams_[slot]) return;
    char* row = first_row(slot, now_);
    for (int64_t i = 0; i < n_; ++i, row += row_step(slot))
      stream_row((const char*)(results_ + i * d_), row, d_ * int64_t(sizeof(In)));
  }

  // Rows of one head are short, and neighbours in time may be far apart: no hardware prefetcher foresees them.
  VIDATTN_INLINE void fetch_next(Slot slot, int64_t begin, int64_t end) const {
    const char* row = first_row(slot, next_);
    for (int64_t i = begin; i < end; ++i) fetch_row(row + i * row_step(slot), d_ * int64_t(sizeof(In)));
  }

  const DividedArgs& a_;
  const int64_t n_, d_, vectors_;  // vectors that hold rows in use
  const Dropout dropout_;
  Place now_, next_;
  const In* from_[kDout + 1][L];
  In* to_[3][L];
  In unused_[kMaxDim];  // where missing rows are written to
  bool streams_[kSlots];
  alignas(64) In results_[L * kMaxDim];  // of the one sum in work
  alignas(64) In copies_[kDout + 1][L * kMaxDim];
  alignas(64) T weights_[L * L], gradients_[L * L], keep_[L * L], beyond_[L < kLanes<T> ? kLanes<T> : L];

  // Of the cls token: its rows; the column of its key, each number in all of a row of (L, L); the row of its query.
  static constexpr int kColumn = Cls ? L * L : 1, kRowLength = L + kLanes<T>;
  const In* cls_[kDout + 1];
  alignas(64) T column_weights_[kColumn], column_gradients_[kColumn], keep_cls_[kColumn];
  alignas(64) T scores_of_cls_[kRowLength], row_weights_[kRowLength], row_gradients_[kRowLength];
};

template <class P, class In, bool Cls>
void run_short_sequences(const DividedArgs& args, bool backward, int64_t begin, int64_t end) {
  static_assert(kShortSequence == 16);
  if (args.patches <= 4)
    ShortSequences<P, In, 4, Cls>(args).run(backward, begin, end);
  else if (args.patches <= 8)
    ShortSequences<P, In, 8, Cls>(args).run(backward, begin, end);
  else
    ShortSequences<P, In, 16, Cls>(args).run(backward, begin, end);
}

// These are bound by memory, so rows of 16 bits are widened in registers: there is a kernel for each type of tensor.
template <class P>
void run_short_sequences(const DividedArgs& args, bool backward, int64_t begin, int64_t end) {
  with_element<P>(args.element, [&](auto element) {
    using In = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
    if (args.cls)
      run_short_sequences<P, In, true>(args, backward, begin, end);
    else
      run_short_sequences<P, In, false>(args, backward, begin, end);
  });
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
