#define VIDATTN_ISA avx512amx
#include "mixing.h"

namespace vidattn {
const KernelTable<MixingKernels> mixing_avx512amx = {.bfloat16 = avx512amx::mixing_kernels<avx512amx::Bf16Tiles>()};
}  // namespace vidattn
