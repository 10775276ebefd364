// Space-time mixing attention on the CPU, for one instruction set: the tokens of a frame, with keys and values of which
// channels lie in other frames. A head's channels are cut into runs of one frame offset. Most heads have a single run,
// whose rows are read where they lie; the rows of the others are put together while they are packed.
//
// Each run of a gradient goes back to the frame it came from. Where there is none, the run of the frame that the offset
// reaches around the segment's end, which nobody has read, gets zeros: so every element is written once.
#pragma once
#include "attention.h"
#include "mixing_kernels.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P>
class MixedFrames final : public Group<P> {
  using T = typename P::Acc;
  using Value = typename P::Value;

 public:
  // Lays out the scratch memory; with base == nullptr only bytes() may be called.
  MixedFrames(const MixingArgs& args, bool backward, char* base)
      : a_(args),
        arena_(base),
        engine_(a_.tokens, a_.head_dim, a_.scale, {a_.dropout_p, a_.seed}, backward, arena_),
        runs_(arena_.template take<Run>(2 * a_.num_shifts + 1)) {
    this->keys = this->queries = a_.tokens;
  }
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

  void read(Slot slot, int64_t first, int64_t count, const Value** rows, Value* spare) const override {
    const bool mixed = is_of_keys(slot) && num_runs_ > 1;
    for (int64_t r = 0; r < count; ++r, spare += kMaxDim)
      if (mixed) {
        rows[r] = mix(slot, first + r, spare);
      } else {
        const char* row = is_of_keys(slot) ? row_of(runs_[0], slot, first + r) : at(slot, this->index, first + r);
        rows[r] = read_row<P>(a_.element, row, a_.head_dim, spare);
      }
  }

  void write(Slot slot, int64_t first, int64_t count, const T* from, int64_t step, T factor) override {
    const int64_t bytes = bytes_of(a_.element);
    for (int64_t i = first; i < first + count; ++i, from += step) {
      if (!is_of_keys(slot)) {
        write_row<P>(a_.element, from, factor, at(slot, this->index, i), a_.head_dim);
        continue;
      }
      if (i + 8 < first + count) fetch_to_write(slot, i + 8, 1);
      for (int64_t r = 0; r < num_runs_; ++r) {
        const Run& run = runs_[r];
        const int64_t length = run.last - run.first;
        char* to = at(slot, run.frame, i) + run.first * bytes;
        if (run.inside)
          write_row<P>(a_.element, from + run.first, factor, to, length);
        else
          for (int64_t x = 0; x < length * bytes; ++x) to[x] = 0;
      }
    }
  }

  void fetch_to_write(Slot slot, int64_t first, int64_t count) const override {
    for (int64_t i = first; i < first + count; ++i) fetch_row<true>(at(slot, this->index, i), row_bytes());
  }

  void fetch_next(int64_t begin, int64_t end, Slot last) const override {
    if (next_ < 0) return;
    for (int slot = kQ; slot <= last; ++slot) {
      const RowTensor& t = a_.tensor[slot];
      const char* rows = t.data + next_ / a_.heads * t.stride[0] + next_ % a_.heads * t.stride[2];
      for (int64_t i = begin; i < end; ++i) fetch_row(rows + i * t.stride[1], row_bytes());
    }
  }

 private:
  struct Run {  // channels [first, last) of the head
    int64_t first, last;
    int64_t frame;  // where they lie; where their zeros go if the segment has no such frame
    bool inside;
  };

  char* at(Slot slot, int64_t frame, int64_t i) const {
    const RowTensor& t = a_.tensor[slot];
    return t.data + frame * t.stride[0] + i * t.stride[1] + this->head * t.stride[2];
  }
  int64_t row_bytes() const { return a_.head_dim * bytes_of(a_.element); }

  // The row that a run of a key or value is read from.
  const char* row_of(const Run& run, Slot slot, int64_t i) const {
    return run.inside ? at(slot, run.frame, i) : kZeros;
  }
  // A key or value of several runs.
  const Value* mix(Slot slot, int64_t i, Value* to) const {
    Value widened[kMaxDim];
    for (int64_t r = 0; r < num_runs_; ++r) {
      const Value* from = read_row<P>(a_.element, row_of(runs_[r], slot, i), a_.head_dim, widened);
      for (int64_t c = runs_[r].first; c < runs_[r].last; ++c) to[c] = from[c];
    }
    return to;
  }

  void start(int64_t task, int64_t end) {
    this->index = task / a_.heads, this->head = task % a_.heads;
    next_ = task + 1 < end ? task + 1 : -1;
    num_runs_ = 0;
    const int64_t from = this->head * a_.head_dim, to = from + a_.head_dim;
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
    const int64_t t = this->index % a_.segment, there = t + offset;
    const int64_t around = (there % a_.segment + a_.segment) % a_.segment;
    runs_[num_runs_++] = {first, last, this->index - t + around, there == around};
  }

  const MixingArgs& a_;
  Arena arena_;
  Attention<P> engine_;
  Run* runs_;
  int64_t num_runs_ = 0, next_ = -1;
};

template <class P>
constexpr MixingKernels mixing_kernels() {
  return kernels_of<P, MixedFrames<P>, MixingArgs>();
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
