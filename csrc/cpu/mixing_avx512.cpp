#define VIDATTN_ISA avx512
#include "mixing.h"

namespace vidattn {
using namespace avx512;
const KernelTable<MixingKernels> mixing_avx512 = {mixing_kernels<Plain<float>>(), mixing_kernels<Plain<double>>(), {}};
}  // namespace vidattn
