#define VIDATTN_ISA avx512bf16
#include "divided.h"

namespace vidattn {
const KernelTable<DividedKernels> divided_avx512bf16 = {.bfloat16 =
                                                            avx512bf16::divided_kernels<avx512bf16::Bf16Pairs>()};
}  // namespace vidattn
