#define VIDATTN_ISA avx2
#include "mixing.h"

namespace vidattn {
using namespace avx2;
const MixingTable mixing_avx2 = {mixing_kernels<Plain<float>, float>(), mixing_kernels<Plain<double>, double>(),
                                 mixing_kernels<Plain<float>, bf16>(), mixing_kernels<Plain<float>, f16>()};
}  // namespace vidattn
