#define VIDATTN_ISA avx2
#include "window3d.h"

namespace vidattn {
using namespace avx2;
const KernelTable<Window3dKernels> window3d_avx2 = {
    window3d_kernels<Plain<float>>(), window3d_kernels<Plain<double>>(), {}};
}  // namespace vidattn
