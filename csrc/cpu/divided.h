// Attention over time and over space on the CPU, for one instruction set: sequences of rows that lie a fixed step
// apart, and perhaps a cls token in front of them that the frames of a clip share. Long ones go through attention.h,
// short ones through divided_short.h.
#pragma once
#include "attention.h"
#include "divided_args.h"
#include "divided_short.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P, class In>
class LongSequences {
  using T = typename P::Acc;

 public:
  // Lays out the scratch memory; with base == nullptr only bytes() may be called.
  LongSequences(const DividedArgs& args, bool backward, char* base)
      : a_(args),
        arena_(base),
        engine_(a_.cls + a_.patches, a_.head_dim, a_.scale, {a_.dropout_p, a_.seed}, backward, arena_) {}
  int64_t bytes() const { return arena_.used(); }

  void forward(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      start(task, end, {kQ, kK, kV, kOut});
      engine_.forward(*this);
    }
  }
  void backward(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      start(task, end, {kQ, kK, kV, kDout, kDq, kDk, kDv});
      if (a_.cls) {
        const T* dcls = (const T*)a_.dcls + clip_ * a_.dcls_stride[0] + frame_ * a_.dcls_stride[1];
        narrow_row(dcls + head_ * a_.head_dim, T(1), dcls_, a_.head_dim);
        rows_[kDout].cls = dcls_;
      }
      engine_.backward(*this);
    }
  }

  // ---- What attention.h asks for ----

  int64_t query_count() const { return a_.cls + a_.patches; }
  int64_t query(int64_t n) const { return n; }
  int64_t head() const { return head_; }
  int64_t index() const { return clip_ * a_.groups + frame_; }

  const In* row(Slot slot, int64_t i) const { return i < a_.cls ? rows_[slot].cls : rows_[slot].patch(i - a_.cls); }

  void put(Slot slot, int64_t i, int64_t c, const T* from, T factor, int64_t n) const {
    if (i >= a_.cls) return narrow_row(from, factor, (In*)rows_[slot].patch(i - a_.cls) + c, n);
    const int64_t which = slot == kOut ? 0 : slot - kDq;
    T* to = (T*)(slot == kOut ? a_.cls_out : a_.cls_gradients);
    to += (((which * a_.batch + clip_) * a_.frames + frame_) * a_.heads + head_) * a_.head_dim + c;
    for (int64_t x = 0; x < n; ++x) to[x] = from[x] * factor;
  }

  void prefetch(int64_t begin, int64_t end, Slot last) const {
    if (!has_next_) return;
    for (int slot = kQ; slot <= last; ++slot)
      for (int64_t i = begin; i < end && i < a_.patches; ++i) fetch_row(next_rows_[slot].patch(i), a_.head_dim);
  }

  void expect(Slot slot, int64_t i) const {
    if (i >= a_.cls) fetch_row<true>(rows_[slot].patch(i - a_.cls), a_.head_dim);
  }

  TileRange choose_tiles(int64_t, int64_t) const { return engine_.all_tiles(); }
  template <int R, int NV>
  VIDATTN_INLINE void finish_scores(int64_t, int64_t, T scale, Vec<T> (&s)[R][NV]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) s[r][n] *= scale;
  }

  // Nothing of this family depends on these.
  void keep_lse(int64_t, T, T) const {}
  void keys_packed() const {}
  void set_row(int64_t, int64_t) const {}
  void add_score_gradients(int64_t, int64_t, int64_t, Vec<T>) const {}

 private:
  struct Rows {
    const In *first, *cls;
    int64_t step;
    const In* patch(int64_t i) const { return first + i * step; }
  };

  Rows sequence(Slot slot, int64_t task) const {
    const int64_t group = task / a_.num_heads, head = a_.first_head + task % a_.num_heads;
    const RowTensor& t = a_.tensor[slot];
    const In* patches = (const In*)t.data + group / a_.groups * t.stride[0] + head * t.stride[2];
    return {patches + group % a_.groups * a_.group_step * t.stride[1], patches - t.stride[1],
            a_.position_step * t.stride[1]};
  }

  template <int Count>
  void start(int64_t task, int64_t end, const Slot (&slots)[Count]) {
    head_ = a_.first_head + task % a_.num_heads;
    clip_ = task / a_.num_heads / a_.groups, frame_ = task / a_.num_heads % a_.groups;
    for (Slot slot : slots) rows_[slot] = sequence(slot, task);
    has_next_ = task + 1 < end;
    if (!has_next_) return;
    for (Slot slot : slots)
      if (slot <= kDout) next_rows_[slot] = sequence(slot, task + 1);
  }

  const DividedArgs& a_;
  Arena arena_;
  Attention<P, In> engine_;
  Rows rows_[kSlots], next_rows_[kDout + 1];
  bool has_next_ = false;
  In dcls_[kMaxDim];
  int64_t head_ = 0, clip_ = 0, frame_ = 0;  // frame_ is a site where sequences run over time
};

template <class P, class In>
void add_frames(const DividedArgs& a, bool backward, int64_t clip) {
  using T = typename P::Acc;
  for (int which = 0; which < (backward ? 3 : 1); ++which) {
    const RowTensor& to = backward ? a.tensor[kDq + which] : a.cls_mean;
    const T* from = (const T*)(backward ? a.cls_gradients : a.cls_out);
    from += (which * a.batch + clip) * a.frames * a.heads * a.head_dim;
    for (int64_t head = 0; head < a.heads; ++head) {
      double total[kMaxDim] = {};  // there may be many frames
      for (int64_t t = 0; t < a.frames; ++t)
        for (int64_t c = 0; c < a.head_dim; ++c) total[c] += from[(t * a.heads + head) * a.head_dim + c];
      In* row = (In*)to.data + clip * to.stride[0] + head * to.stride[2] - to.stride[1];
      T exact[kMaxDim];
      for (int64_t c = 0; c < a.head_dim; ++c) exact[c] = T(backward ? total[c] : total[c] / double(a.frames));
      narrow_row(exact, T(1), row, a.head_dim);
    }
  }
}

template <class P, class In>
constexpr DividedKernels divided_kernels() {
  return {[](const DividedArgs& args, bool backward) {
            return args.short_sequences ? 0 : LongSequences<P, In>(args, backward, nullptr).bytes();
          },
          [](const DividedArgs& args, int64_t begin, int64_t end, char* scratch) {
            if (args.short_sequences)
              run_short_sequences<P, In>(args, false, begin, end);
            else
              LongSequences<P, In>(args, false, scratch).forward(begin, end);
          },
          [](const DividedArgs& args, int64_t begin, int64_t end, char* scratch) {
            if (args.short_sequences)
              run_short_sequences<P, In>(args, true, begin, end);
            else
              LongSequences<P, In>(args, true, scratch).backward(begin, end);
          },
          add_frames<P, In>};
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
