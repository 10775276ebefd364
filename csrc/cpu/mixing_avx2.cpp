#define VIDATTN_ISA avx2
#include "mixing.h"

namespace vidattn {
using namespace avx2;
const KernelTable<MixingKernels> mixing_avx2 = {mixing_kernels<Plain<float>>(), mixing_kernels<Plain<double>>(), {}};
}  // namespace vidattn
