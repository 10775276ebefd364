#define VIDATTN_ISA baseline
#include "window3d.h"

namespace vidattn {
using namespace baseline;
const KernelTable<Window3dKernels> window3d_baseline = {
    window3d_kernels<Plain<float>>(), window3d_kernels<Plain<double>>(), {}};
}  // namespace vidattn
