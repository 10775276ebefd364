#define VIDATTN_ISA avx2
#include "divided.h"

namespace vidattn {
using namespace avx2;
const DividedTable divided_avx2 = {divided_kernels<Plain<float>, float>(), divided_kernels<Plain<double>, double>(),
                                   divided_kernels<Plain<float>, bf16>(), divided_kernels<Plain<float>, f16>()};
}  // namespace vidattn
