// What mixing.cpp hands to the kernels of an instruction set.
#pragma once
#include <stdint.h>

#include "call.h"
#include "isa.h"

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
  double scale, dropout_p;
  uint64_t seed;
};

// A task is a (frame, head), the frame outermost.
using MixingKernels = Kernels<MixingArgs>;
VIDATTN_DECLARE_KERNELS(mixing, MixingKernels);

}  // namespace vidattn
