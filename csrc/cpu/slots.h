// The tensors of a call. Those that are read come first: the forward pass reads three, the backward pass four.
#pragma once
#include <stdint.h>

namespace vidattn {

enum Slot { kQ, kK, kV, kDout, kOut, kDq, kDk, kDv };
constexpr int kSlots = 8;

struct RowTensor {  // (batch, row, heads, head_dim), last stride 1; null data = absent
  void* data = nullptr;
  int64_t stride[3] = {0, 0, 0};
};

}  // namespace vidattn
