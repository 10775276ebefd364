#define VIDATTN_ISA avx512
#include "window3d.h"

namespace vidattn {
using namespace avx512;
const Window3dTable window3d_avx512 = {window3d_kernels<Plain<float>, float>(),
                                       window3d_kernels<Plain<double>, double>(),
                                       window3d_kernels<Plain<float>, bf16>(), window3d_kernels<Plain<float>, f16>()};
}  // namespace vidattn
