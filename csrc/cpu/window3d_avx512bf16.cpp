#define VIDATTN_ISA avx512bf16
#include "window3d.h"

namespace vidattn {
using namespace avx512bf16;
const Window3dTable window3d_avx512bf16 = {{}, {}, window3d_kernels<Bf16Pairs, bf16>(), {}};
}  // namespace vidattn
