// Attention over sequences of a few rows, by the warp. The ops turn a call to one axis, ask and start.
#pragma once
#include "divided_args.h"

namespace vidattn::cuda {

constexpr int kShortLength = 32;

// Whether these kernels run the call along the axis that it is turned to.
inline bool is_short(const DividedArgs& call) {
  return call.cls == 0 && call.patches <= kShortLength;
}

// Start a pass on a stream. Return null, or what went wrong. The backward pass reads neither context nor log-sum-exp.
const char* divided_short_forward(const DividedArgs& call, void* stream);
const char* divided_short_backward(const DividedArgs& call, void* stream);

}  // namespace vidattn::cuda
