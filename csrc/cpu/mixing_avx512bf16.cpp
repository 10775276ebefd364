#define VIDATTN_ISA avx512bf16
#include "mixing.h"

namespace vidattn {
const KernelTable<MixingKernels> mixing_avx512bf16 = {.bfloat16 = avx512bf16::mixing_kernels<avx512bf16::Bf16Pairs>()};
}  // namespace vidattn
