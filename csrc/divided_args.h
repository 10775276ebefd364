// What the native ops of the divided family hand to the kernels of a device.
#pragma once
#include <stdint.h>

#include "call.h"

namespace vidattn {

// One clip's patches as sequences along one axis. The patch at position p of group g of a clip has the number
// g * group_step + p * position_step.
struct DividedArgs {
  int64_t batch, frames, heads, head_dim;
  int64_t cls;                    // 1: a row in front of the patches opens every sequence; else 0
  bool cls_sees_all;              // its query attends to the whole clip, and takes no part in the sequences
  int64_t sites;                  // of a frame
  bool time_fastest;              // whether the frames of a site are neighbours, or the sites of a frame
  int64_t temporal_heads;         // the first ones attend over time, the others over space
  int64_t first_head, num_heads;  // the heads that attend along this axis
  int64_t patches;                // of a sequence, the cls token not counted
  int64_t groups;                 // of a clip
  int64_t group_step, position_step;
  bool short_sequences;  // which kernel; a task is then a group, else a (group, head)
  int64_t tasks;         // in all clips, the clip outermost

  Element element;
  RowTensor tensor[kSlots];  // from the first patch on

  // The cls token is shared by the groups of a clip: (batch, groups, heads, head_dim) in the accumulator's type.
  void* cls_out;
  const void* dcls;
  int64_t dcls_stride[2];  // of the batch and of the frames
  void* cls_gradients;     // (3, batch, groups, heads, head_dim): each group's share for q, k and v
  RowTensor cls_mean;      // (batch, 1, heads, head_dim), where the mean of cls_out goes
  // If its query sees all, (2, batch, heads, cls_stride()): the weight of each row, with dropout, and the gradient of
  // its score times the scale.
  void* cls_weights;
  static constexpr int64_t kClsBlock = 16;
  int64_t rows() const { return cls + frames * sites; }
  int64_t cls_stride() const { return round_up(rows(), kClsBlock); }
  // On CUDA, log-sum-exp in the accumulator's type: (batch, rows, heads), the patches in token order, then the cls
  // token in each frame; null if nobody needs it.
  void* lse;

  double scale, dropout_p;
  uint64_t seed;
};

}  // namespace vidattn
