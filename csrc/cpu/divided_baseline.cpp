#define VIDATTN_ISA baseline
#include "divided.h"

namespace vidattn {
using namespace baseline;
const DividedTable divided_baseline = {divided_kernels<Plain<float>, float>(), divided_kernels<Plain<double>, double>(),
                                       divided_kernels<Plain<float>, bf16>(), divided_kernels<Plain<float>, f16>()};
}  // namespace vidattn
