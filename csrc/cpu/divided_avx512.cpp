#define VIDATTN_ISA avx512
#include "divided.h"

namespace vidattn {
using namespace avx512;
const KernelTable<DividedKernels> divided_avx512 = {
    divided_kernels<Plain<float>>(), divided_kernels<Plain<double>>(), {}};
}  // namespace vidattn
