#define VIDATTN_ISA avx2
#include "divided.h"

namespace vidattn {
using namespace avx2;
const KernelTable<DividedKernels> divided_avx2 = {
    divided_kernels<Plain<float>>(), divided_kernels<Plain<double>>(), {}};
}  // namespace vidattn
