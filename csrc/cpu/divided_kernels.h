// The kernels of the divided family, one set for each instruction set.
#pragma once
#include "divided_args.h"
#include "isa.h"

namespace vidattn {

// Sequences of at most this many patches, without a query of a cls token, are computed where they lie.
constexpr int64_t kShortSequence = 16;

struct DividedKernels : Kernels<DividedArgs> {
  // Of a cls token, on one thread each; divided_cls.h says what they do.
  using Part = void (*)(const DividedArgs&, bool backward, int64_t begin, int64_t end);
  Part cls_scores;   // [begin, end) are rows of all clips
  Part cls_softmax;  // heads of all clips
  Part add_groups;   // heads of all clips
};
VIDATTN_DECLARE_KERNELS(divided, DividedKernels);

}  // namespace vidattn
