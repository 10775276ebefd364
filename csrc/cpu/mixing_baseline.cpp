#define VIDATTN_ISA baseline
#include "mixing.h"

namespace vidattn {
using namespace baseline;
const MixingTable mixing_baseline = {mixing_kernels<Plain<float>, float>(), mixing_kernels<Plain<double>, double>(),
                                     mixing_kernels<Plain<float>, bf16>(), mixing_kernels<Plain<float>, f16>()};
}  // namespace vidattn
