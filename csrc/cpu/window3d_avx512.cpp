#define VIDATTN_ISA avx512
#include "window3d.h"

namespace vidattn {
using namespace avx512;
const KernelTable<Window3dKernels> window3d_avx512 = {
    window3d_kernels<Plain<float>>(), window3d_kernels<Plain<double>>(), {}};
}  // namespace vidattn
