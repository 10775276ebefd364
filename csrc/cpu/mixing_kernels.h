// The kernels of the mixing family, one set for each instruction set.
#pragma once
#include "isa.h"
#include "mixing_args.h"

namespace vidattn {

// A task is a (frame, head), the frame outermost.
using MixingKernels = Kernels<MixingArgs>;
VIDATTN_DECLARE_KERNELS(mixing, MixingKernels);

}  // namespace vidattn
