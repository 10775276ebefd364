// What the native ops of the mixing family hand to the kernels of a device.
#pragma once
#include <stdint.h>

#include "call.h"

namespace vidattn {

// Channels [first, last) of frame t are those of frame t + offset, zeros where its segment has no such frame.
struct ChannelShift {
  int64_t first, last, offset;
};

struct MixingArgs {
  int64_t frames, segment;  // in all, and those between which channels move
  int64_t tokens, heads, head_dim;
  const ChannelShift* shifts;  // on the concatenated channels, in ascending order, not overlapping
  int64_t num_shifts;
  Element element;
  RowTensor tensor[kSlots];  // (frame, token, heads, head_dim)
  void* lse;                 // on CUDA: log-sum-exp (frame, token, heads) in the accumulator's type, or null
  double scale, dropout_p;
  uint64_t seed;
};

}  // namespace vidattn
