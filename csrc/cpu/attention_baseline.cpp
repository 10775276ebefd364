#define VIDATTN_ISA baseline
#include "attention_backward.h"
#include "attention_forward.h"

namespace vidattn::baseline {
template class Attention<Plain<float>>;
template class Attention<Plain<double>>;
}  // namespace vidattn::baseline
