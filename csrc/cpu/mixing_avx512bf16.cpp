#define VIDATTN_ISA avx512bf16
#include "mixing.h"

namespace vidattn {
using namespace avx512bf16;
const MixingTable mixing_avx512bf16 = {{}, {}, mixing_kernels<Bf16Pairs, bf16>(), {}};
}  // namespace vidattn
