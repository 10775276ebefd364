#define VIDATTN_ISA avx512
#include "attention_backward.h"
#include "attention_forward.h"

namespace vidattn::avx512 {
template class Attention<Plain<float>>;
template class Attention<Plain<double>>;
}  // namespace vidattn::avx512
