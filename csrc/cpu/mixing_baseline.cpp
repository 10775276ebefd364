#define VIDATTN_ISA baseline
#include "mixing.h"

namespace vidattn {
using namespace baseline;
const KernelTable<MixingKernels> mixing_baseline = {
    mixing_kernels<Plain<float>>(), mixing_kernels<Plain<double>>(), {}};
}  // namespace vidattn
