#define VIDATTN_ISA avx2
#include "attention_backward.h"
#include "attention_forward.h"

namespace vidattn::avx2 {
template class Attention<Plain<float>>;
template class Attention<Plain<double>>;
}  // namespace vidattn::avx2
