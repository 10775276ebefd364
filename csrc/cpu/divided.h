// Attention over time and over space on the CPU, for one instruction set: sequences of rows that lie a fixed step
// apart, and perhaps a cls token in front of them that the frames of a clip share. Long ones go through attention.h,
// short ones through divided_short.h.
#pragma once
#include "attention.h"
#include "divided_kernels.h"
#include "divided_short.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P>
class LongSequences final : public Group<P> {
  using T = typename P::Acc;
  using Value = typename P::Value;

 public:
  // Lays out the scratch memory; with base == nullptr only bytes() may be called.
  LongSequences(const DividedArgs& args, bool backward, char* base)
      : a_(args),
        arena_(base),
        skipped_(args.cls_sees_all),
        engine_(a_.cls + a_.patches, a_.head_dim, a_.scale, {a_.dropout_p, a_.seed}, backward, arena_) {
    for (int slot = kOut; slot < kSlots; ++slot) streams_[slot] = streams_result(a_, Slot(slot));
    this->keys = a_.cls + a_.patches;
    this->queries = this->keys - skipped_;
  }
  int64_t bytes() const { return arena_.used(); }

  void forward(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      start(task, end, {kQ, kK, kV, kOut});
      engine_.forward(*this);
      if (a_.cls_sees_all) sum_of_rows(kV, false, a_.cls_out);
    }
  }
  void backward(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      start(task, end, {kQ, kK, kV, kDout, kDq, kDk, kDv});
      if (a_.cls_sees_all) {
        widen_row(kQ, cls_q_);
        widen_row(kDout, cls_dout_);
      } else if (a_.cls) {
        const T* dcls = (const T*)a_.dcls + this->index / a_.groups * a_.dcls_stride[0] +
                        this->index % a_.groups * a_.dcls_stride[1];
        write_row<P>(a_.element, dcls + this->head * a_.head_dim, T(1), dcls_, a_.head_dim);
        rows_[kDout].cls = dcls_;
      }
      engine_.backward(*this);
      if (a_.cls_sees_all) sum_of_rows(kK, true, a_.cls_gradients);
    }
  }

  // ---- What attention.h asks for ----

  int64_t position(int64_t query) const override { return skipped_ + query; }

  void read(Slot slot, int64_t first, int64_t count, const Value** rows, Value* spare) const override {
    first += is_of_keys(slot) ? 0 : skipped_;
    for (int64_t r = 0; r < count; ++r)
      rows[r] = read_row<P>(a_.element, row(slot, first + r), a_.head_dim, spare + r * kMaxDim);
  }

  void write(Slot slot, int64_t first, int64_t count, const T* from, int64_t step, T factor) override {
    first += is_of_keys(slot) ? 0 : skipped_;
    for (int64_t i = first; i < first + count; ++i, from += step) {
      if (is_of_keys(slot) && i + 8 < first + count) fetch_to_write(slot, i + 8, 1);
      if (i < a_.cls) {
        const bool is_context = slot == kOut;
        T* to = share_of_group<T>(a_, is_context ? a_.cls_out : a_.cls_gradients, is_context ? 0 : slot - kDq,
                                  this->index, this->head);
        for (int64_t c = 0; c < a_.head_dim; ++c) to[c] = from[c] * factor;
      } else if (a_.cls_sees_all && is_of_keys(slot)) {
        const T *of_cls = slot == kDk ? cls_q_ : cls_dout_, weight = weights(slot == kDk)[(i - 1) * a_.position_step];
        T total[kMaxDim];
        for (int64_t c = 0; c < a_.head_dim; ++c) total[c] = from[c] * factor + weight * of_cls[c];
        write_row<P>(a_.element, total, T(1), row(slot, i), a_.head_dim);
      } else if (streams_[slot]) {
        alignas(64) char line[kMaxDim * sizeof(T)];
        write_row<P>(a_.element, from, factor, line, a_.head_dim);
        stream_row(line, row(slot, i), row_bytes());
      } else {
        write_row<P>(a_.element, from, factor, row(slot, i), a_.head_dim);
      }
    }
  }

  void fetch_to_write(Slot slot, int64_t first, int64_t count) const override {
    if (streams_[slot]) return;
    first += is_of_keys(slot) ? 0 : skipped_;
    for (int64_t i = first < a_.cls ? a_.cls : first; i < first + count; ++i)
      fetch_row<true>(row(slot, i), row_bytes());
  }

  void fetch_next(int64_t begin, int64_t end, Slot last) const override {
    if (!has_next_) return;
    for (int64_t i = begin; i < end && i < a_.patches; ++i)
      for (int slot = kQ; slot <= last; ++slot) fetch_row(next_rows_[slot].patch(i), row_bytes());
  }

 private:
  struct Rows {
    char *first, *cls;
    int64_t step;
    char* patch(int64_t i) const { return first + i * step; }
  };

  char* row(Slot slot, int64_t i) const { return i < a_.cls ? rows_[slot].cls : rows_[slot].patch(i - a_.cls); }
  int64_t row_bytes() const { return a_.head_dim * bytes_of(a_.element); }

  Rows sequence(Slot slot, int64_t task) const {
    const int64_t group = task / a_.num_heads, head = a_.first_head + task % a_.num_heads;
    const RowTensor& t = a_.tensor[slot];
    char* patches = t.data + group / a_.groups * t.stride[0] + head * t.stride[2];
    return {patches + group % a_.groups * a_.group_step * t.stride[1], patches - t.stride[1],
            a_.position_step * t.stride[1]};
  }

  template <int Count>
  void start(int64_t task, int64_t end, const Slot (&slots)[Count]) {
    this->head = a_.first_head + task % a_.num_heads, this->index = task / a_.num_heads;
    for (Slot slot : slots) rows_[slot] = sequence(slot, task);
    has_next_ = task + 1 < end;
    if (!has_next_) return;
    for (Slot slot : slots)
      if (slot <= kDout) next_rows_[slot] = sequence(slot, task + 1);
  }

  // What the query of a cls token that sees all has for the sequence's patches, position_step apart.
  const T* weights(bool gradients) const {
    return cls_weights<T>(a_, gradients, this->index / a_.groups, this->head) + first_row_of(a_, this->index);
  }
  // The sequence's share of what they sum up to.
  void sum_of_rows(Slot slot, bool gradients, void* shares) const {
    const T* weight = weights(gradients);
    T total[kMaxDim] = {};
    for (int64_t i = 0; i < a_.patches; ++i, weight += a_.position_step) {
      Value spare[kMaxDim];
      const Value* values = read_row<P>(a_.element, row(slot, a_.cls + i), a_.head_dim, spare);
      for (int64_t c = 0; c < a_.head_dim; ++c) total[c] += *weight * widen(values[c]);
    }
    T* to = share_of_group<T>(a_, shares, 0, this->index, this->head);
    for (int64_t c = 0; c < a_.head_dim; ++c) to[c] = total[c];
  }
  void widen_row(Slot slot, T* to) const {
    Value spare[kMaxDim];
    const Value* values = read_row<P>(a_.element, rows_[slot].cls, a_.head_dim, spare);
    for (int64_t c = 0; c < a_.head_dim; ++c) to[c] = widen(values[c]);
  }

  const DividedArgs& a_;
  Arena arena_;
  const int64_t skipped_;  // queries that others answer: that of a cls token that sees all
  Attention<P> engine_;
  Rows rows_[kSlots], next_rows_[kDout + 1];
  bool has_next_ = false;
  bool streams_[kSlots];
  alignas(T) char dcls_[kMaxDim * sizeof(T)];
  T cls_q_[kMaxDim], cls_dout_[kMaxDim];
};

// Either kind of sequence, as the call says. float64 has no kernel for short ones.
template <class P, bool backward>
void run_sequences(const DividedArgs& args, int64_t begin, int64_t end, char* scratch) {
  if constexpr (sizeof(typename P::Acc) != 8)
    if (args.short_sequences) {
      run_short_sequences<P>(args, backward, begin, end);
      return end_stream();
    }
  [[maybe_unused]] Registers<P> registers;
  LongSequences<P> sequences(args, backward, scratch);
  if constexpr (backward)
    sequences.backward(begin, end);
  else
    sequences.forward(begin, end);
  end_stream();
}

template <class P>
constexpr DividedKernels divided_kernels() {
  DividedKernels kernels = {{[](const DividedArgs& args, bool backward) {
                               return args.short_sequences ? 0 : LongSequences<P>(args, backward, nullptr).bytes();
                             },
                             run_sequences<P, false>, nullptr},
                            cls_scores<P>,
                            cls_softmax<P>,
                            add_groups<P>};
  if constexpr (!P::tiles) kernels.backward = run_sequences<P, true>;
  return kernels;
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
