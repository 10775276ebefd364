#define VIDATTN_ISA baseline
#include "window3d.h"

namespace vidattn {
using namespace baseline;
const Window3dTable window3d_baseline = {window3d_kernels<Plain<float>, float>(),
                                         window3d_kernels<Plain<double>, double>(),
                                         window3d_kernels<Plain<float>, bf16>(), window3d_kernels<Plain<float>, f16>()};
}  // namespace vidattn
