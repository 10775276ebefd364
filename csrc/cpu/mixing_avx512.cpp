#define VIDATTN_ISA avx512
#include "mixing.h"

namespace vidattn {
using namespace avx512;
const MixingTable mixing_avx512 = {mixing_kernels<Plain<float>, float>(), mixing_kernels<Plain<double>, double>(),
                                   mixing_kernels<Plain<float>, bf16>(), mixing_kernels<Plain<float>, f16>()};
}  // namespace vidattn
