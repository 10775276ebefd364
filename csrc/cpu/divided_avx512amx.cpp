#define VIDATTN_ISA avx512amx
#include "divided.h"

namespace vidattn {
const KernelTable<DividedKernels> divided_avx512amx = {.bfloat16 = avx512amx::divided_kernels<avx512amx::Bf16Tiles>()};
}  // namespace vidattn
