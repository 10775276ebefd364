// Space-time mixing attention on the CPU, for one instruction set: the tokens of a frame, with keys and values of which
// channels lie in other frames. A head's channels are cut into runs of one frame offset. Most heads have a single run,
// whose rows are read where they lie; the rows of the others are put together while they are packed.
//
// Each run of a gradient goes back to the frame it came from. Where there is none, the run of the frame that the offset
// reaches around the segment's end, which nobody has read, gets zeros: so every element is written once.
#pragma once
#include "attention.h"
#include "mixing_args.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P, class In>
class MixedFrames {
  using T = typename P::Acc;

 public:
  // Lays out the scratch memory; with base == nullptr only bytes() may be called.
  MixedFrames(const MixingArgs& args, bool backward, char* base)
      : a_(args),
        arena_(base),
        engine_(a_.tokens, a_.head_dim, a_.scale, {a_.dropout_p, a_.seed}, backward, arena_),
        runs_(arena_.template take<Run>(2 * a_.num_shifts + 1)),
        mixed_(arena_.template take<In>(Attention<P, In>::kWidth * kMaxDim)) {}
  int64_t bytes() const { return arena_.used(); }

  void forward(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      start(task, end);
      engine_.forward(*this);
    }
  }
  void backward(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      start(task, end);
      engine_.backward(*this);
    }
  }

  // ---- What attention.h asks for ----

  int64_t query_count() const { return a_.tokens; }
  int64_t query(int64_t n) const { return n; }
  int64_t head() const { return head_; }
  int64_t index() const { return frame_; }

  const In* row(Slot slot, int64_t i) const {
    if (slot != kK && slot != kV) return at(slot, frame_, i);
    if (num_runs_ == 1) return runs_[0].inside ? at(slot, runs_[0].frame, i) : kZeros<In>;
    In* to = mixed_ + i % Attention<P, In>::kWidth * kMaxDim;  // a tile of rows is in use at a time
    for (int64_t r = 0; r < num_runs_; ++r) {
      const Run& run = runs_[r];
      const In* from = run.inside ? at(slot, run.frame, i) : kZeros<In>;
      for (int64_t c = run.first; c < run.last; ++c) to[c] = from[c];
    }
    return to;
  }

  void put(Slot slot, int64_t i, int64_t c, const T* from, T factor, int64_t n) const {
    if (slot != kDk && slot != kDv) return narrow_row(from, factor, at(slot, frame_, i) + c, n);
    for (int64_t r = 0; r < num_runs_; ++r) {  // gradients of keys and values come whole: c is 0
      const Run& run = runs_[r];
      In* to = at(slot, run.frame, i) + run.first;
      if (run.inside)
        narrow_row(from + run.first, factor, to, run.last - run.first);
      else
        for (int64_t x = 0; x < run.last - run.first; ++x) to[x] = In{};
    }
  }

  void prefetch(int64_t begin, int64_t end, Slot last) const {
    if (next_ < 0) return;
    for (int slot = kQ; slot <= last; ++slot) {
      const In* rows = (const In*)a_.tensor[slot].data + next_ / a_.heads * a_.tensor[slot].stride[0] +
                       next_ % a_.heads * a_.tensor[slot].stride[2];
      for (int64_t i = begin; i < end && i < a_.tokens; ++i)
        fetch_row(rows + i * a_.tensor[slot].stride[1], a_.head_dim);
    }
  }
  void expect(Slot slot, int64_t i) const { fetch_row<true>(at(slot, frame_, i), a_.head_dim); }

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
  struct Run {  // channels [first, last) of the head
    int64_t first, last;
    int64_t frame;  // where they lie; where their zeros go if the segment has no such frame
    bool inside;
  };

  In* at(Slot slot, int64_t frame, int64_t i) const {
    const RowTensor& t = a_.tensor[slot];
    return (In*)t.data + frame * t.stride[0] + i * t.stride[1] + head_ * t.stride[2];
  }

  void start(int64_t task, int64_t end) {
    frame_ = task / a_.heads, head_ = task % a_.heads;
    next_ = task + 1 < end ? task + 1 : -1;
    num_runs_ = 0;
    const int64_t from = head_ * a_.head_dim, to = from + a_.head_dim;
    int64_t done = from;
    for (int64_t s = 0; s < a_.num_shifts; ++s) {
      const ChannelShift& shift = a_.shifts[s];
      if (shift.last <= done || shift.first >= to) continue;
      if (shift.first > done) add_run(done - from, shift.first - from, 0);
      const int64_t first = shift.first > done ? shift.first : done;
      done = shift.last < to ? shift.last : to;
      add_run(first - from, done - from, shift.offset);
    }
    if (done < to) add_run(done - from, a_.head_dim, 0);
  }

  void add_run(int64_t first, int64_t last, int64_t offset) {
    const int64_t t = frame_ % a_.segment, there = t + offset;
    const int64_t around = (there % a_.segment + a_.segment) % a_.segment;
    runs_[num_runs_++] = {first, last, frame_ - t + around, there == around};
  }

  const MixingArgs& a_;
  Arena arena_;
  Attention<P, In> engine_;
  Run* runs_;
  In* mixed_;  // [key of the tile][kMaxDim]
  int64_t num_runs_ = 0, head_ = 0, frame_ = 0, next_ = -1;
};

template <class P, class In>
constexpr MixingKernels mixing_kernels() {
  return {[](const MixingArgs& args, bool backward) { return MixedFrames<P, In>(args, backward, nullptr).bytes(); },
          [](const MixingArgs& args, int64_t begin, int64_t end, char* scratch) {
            MixedFrames<P, In>(args, false, scratch).forward(begin, end);
          },
          [](const MixingArgs& args, int64_t begin, int64_t end, char* scratch) {
            MixedFrames<P, In>(args, true, scratch).backward(begin, end);
          }};
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
