// The kernels of the divided family, one set for each instruction set.
#pragma once
#include "divided_args.h"
#include "isa.h"

namespace vidattn {

// Sequences of at most this many rows, without a cls token, are computed where they lie.
constexpr int64_t kShortSequence = 16;

struct DividedKernels : Kernels<DividedArgs> {
  // Adds up what the frames have for the cls token of a clip, in order: the mean of its contexts, or its gradients.
  void (*add_frames)(const DividedArgs&, bool backward, int64_t clip);
};
VIDATTN_DECLARE_KERNELS(divided, DividedKernels);

}  // namespace vidattn
