// The kernels of the window family, one set for each instruction set.
#pragma once
#include "isa.h"
#include "window3d_args.h"

namespace vidattn {

// Forward tasks are (head, window) pairs, backward tasks (head, chunk) pairs, the head outermost.
using Window3dKernels = Kernels<Window3dArgs>;
VIDATTN_DECLARE_KERNELS(window3d, Window3dKernels);

}  // namespace vidattn
