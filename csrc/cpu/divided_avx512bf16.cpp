#define VIDATTN_ISA avx512bf16
#include "divided.h"

namespace vidattn {
using namespace avx512bf16;
const DividedTable divided_avx512bf16 = {{}, {}, divided_kernels<Bf16Pairs, bf16>(), {}};
}  // namespace vidattn
