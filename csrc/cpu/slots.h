// The tensors of a call. Those that are read come first: the forward pass reads three, the backward pass four.
#pragma once

namespace vidattn {

enum Slot { kQ, kK, kV, kDout, kOut, kDq, kDk, kDv };
constexpr int kSlots = 8;

}  // namespace vidattn
