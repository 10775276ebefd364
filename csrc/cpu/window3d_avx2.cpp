#define VIDATTN_ISA avx2
#include "window3d.h"

namespace vidattn {
using namespace avx2;
const Window3dTable window3d_avx2 = {window3d_kernels<Plain<float>, float>(), window3d_kernels<Plain<double>, double>(),
                                     window3d_kernels<Plain<float>, bf16>(), window3d_kernels<Plain<float>, f16>()};
}  // namespace vidattn
