#define VIDATTN_ISA avx512amx
#include "window3d.h"

namespace vidattn {
const KernelTable<Window3dKernels> window3d_avx512amx = {.bfloat16 =
                                                             avx512amx::window3d_kernels<avx512amx::Bf16Tiles>()};
}  // namespace vidattn
