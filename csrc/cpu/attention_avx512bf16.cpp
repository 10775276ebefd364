#define VIDATTN_ISA avx512bf16
#include "attention_backward.h"
#include "attention_forward.h"

namespace vidattn::avx512bf16 {
template class Attention<Bf16Pairs>;
}  // namespace vidattn::avx512bf16
