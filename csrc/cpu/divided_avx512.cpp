#define VIDATTN_ISA avx512
#include "divided.h"

namespace vidattn {
using namespace avx512;
const DividedTable divided_avx512 = {divided_kernels<Plain<float>, float>(), divided_kernels<Plain<double>, double>(),
                                     divided_kernels<Plain<float>, bf16>(), divided_kernels<Plain<float>, f16>()};
}  // namespace vidattn
