#define VIDATTN_ISA avx512amx
#include "attention_forward.h"

namespace vidattn::avx512amx {
template void Attention<Bf16Tiles>::forward(Group<Bf16Tiles>& group);
template float Attention<Bf16Tiles>::longest_query(int64_t count) const;
template float Attention<Bf16Tiles>::longest_key() const;
}  // namespace vidattn::avx512amx
