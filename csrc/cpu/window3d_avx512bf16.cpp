#define VIDATTN_ISA avx512bf16
#include "window3d.h"

namespace vidattn {
const Window3dKernels window3d_avx512bf16 = avx512bf16::window3d_kernels<avx512bf16::Bf16Pairs>();
}  // namespace vidattn
