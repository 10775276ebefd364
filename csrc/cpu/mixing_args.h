// What mixing.cpp hands to the kernels of an instruction set: plain data, so that no torch header reaches files with
// their own flags.
#pragma once
#include <stdint.h>

#include "slots.h"

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
  RowTensor tensor[kSlots];  // (frame, token, heads, head_dim)
  double scale, dropout_p;
  uint64_t seed;
};

// A task is a (frame, head), the frame outermost; [begin, end) runs on one thread.
struct MixingKernels {
  int64_t (*scratch_bytes)(const MixingArgs&, bool backward);
  void (*forward)(const MixingArgs&, int64_t begin, int64_t end, char* scratch);
  void (*backward)(const MixingArgs&, int64_t begin, int64_t end, char* scratch);
};

struct MixingTable {  // by element type; what an instruction set does not have is null
  MixingKernels float32, float64, bfloat16, float16;
};
extern const MixingTable mixing_baseline, mixing_avx2, mixing_avx512, mixing_avx512bf16;

}  // namespace vidattn
