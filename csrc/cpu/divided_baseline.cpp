#define VIDATTN_ISA baseline
#include "divided.h"

namespace vidattn {
using namespace baseline;
const KernelTable<DividedKernels> divided_baseline = {
    divided_kernels<Plain<float>>(), divided_kernels<Plain<double>>(), {}};
}  // namespace vidattn
