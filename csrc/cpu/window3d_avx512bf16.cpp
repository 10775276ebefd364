#define VIDATTN_ISA avx512bf16
#include "window3d.h"

namespace vidattn {
const KernelTable<Window3dKernels> window3d_avx512bf16 = {.bfloat16 =
                                                              avx512bf16::window3d_kernels<avx512bf16::Bf16Pairs>()};
}  // namespace vidattn
