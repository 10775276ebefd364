// What mixing_ops.cpp calls.
#pragma once
#include "mixing_args.h"

namespace vidattn::cuda {

// Starts the forward pass on a stream. Returns null, or what went wrong.
const char* mixing_forward(const MixingArgs& call, void* stream);

// How many floats of memory the backward pass works with.
int64_t mixing_backward_floats(const MixingArgs& call);
// Starts the backward pass.
const char* mixing_backward(const MixingArgs& call, float* workspace, void* stream);

// Channels of (frames, outer, channels, inner), contiguous, that move between frames.
struct ShiftArgs {
  const char* x;
  char* out;
  int64_t frames, segment, outer, channels;
  int64_t channel_bytes;       // of one channel, all that is inner
  const ChannelShift* shifts;  // as in MixingArgs
  int64_t num_shifts;
};

// Starts the shift on a stream. Returns null, or what went wrong.
const char* temporal_shift(const ShiftArgs& call, void* stream);

}  // namespace vidattn::cuda
