// What the families whose groups are sequences find out about a call before they launch a kernel.
#pragma once
#include "sequences.cuh"

namespace vidattn::cuda {

// Start the passes on a stream; all but the plans is filled in. Return null, or what went wrong.
const char* launch_sequences_forward(SequenceArguments a, int64_t groups, Element element, void* stream);
const char* launch_sequences_backward(SequenceArguments a, int64_t groups, Element element, float* dq_sums,
                                      void* stream);
// How many floats of memory the backward pass works with.
int64_t sequences_backward_floats(int64_t keys, int64_t head_dim, int64_t tasks);

using SequenceBackwardKernel = void (*)(const SequenceArguments);
SequenceBackwardKernel walking_sequence_kernel(Element element,
                                               const BackwardPlan& plan);  // sequences_backward_walk.cu

// Rows of a tensor, the steps in its rows.
inline SequenceRows sequence_rows(const RowTensor& t, int64_t head_dim, int64_t clip_stride, int64_t sequence_stride,
                                  int64_t row_step) {
  SequenceRows rows{};
  rows.data = t.data, rows.head_stride = t.stride[2];
  rows.clip_stride = clip_stride, rows.sequence_stride = sequence_stride, rows.row_stride = row_step * t.stride[1];
  rows.cls = t.data - t.stride[1], rows.cls_stride[0] = clip_stride, rows.cls_head_stride = t.stride[2];
  const uint64_t bits = uint64_t(head_dim) * 2 | reinterpret_cast<uintptr_t>(t.data) | uint64_t(t.stride[0]) |
                        uint64_t(t.stride[1]) | uint64_t(t.stride[2]);
  rows.unit = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
  return rows;
}

// What follows from the rows and the other fields.
inline void complete(SequenceArguments& a, double scale) {
  a.scale = float(scale), a.factor = a.scale * kLog2e;
  a.folds = a.scale >= 0x1p-10f && a.scale <= 0x1p10f;
  a.whole_pieces = true;
  for (int i = 0; i < a.ranges; ++i)
    a.whole_pieces &= a.range[i].first % a.head_dim % 8 == 0 && a.range[i].last % a.head_dim % 8 == 0;
  a.gradient_unit = 16;
  for (int slot = 0; slot < kSlots; ++slot) {
    const SequenceRows& rows = a.rows[slot];
    if (!rows.data) continue;
    const bool mixes = a.ranges > 0 && !a.whole_pieces && (slot == kK || slot == kV);
    const bool plain = rows.unit == 16 && rows.row_stride >= 0 && rows.row_stride <= INT32_MAX && !mixes;
    a.plain |= uint32_t(plain) << slot;
    if (slot >= kDq && rows.unit < a.gradient_unit) a.gradient_unit = rows.unit;
  }
}

}  // namespace vidattn::cuda
