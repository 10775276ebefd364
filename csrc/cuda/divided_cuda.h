// What divided_ops.cpp calls, for the heads that set_axis() turned to.
#pragma once
#include "divided_args.h"

namespace vidattn::cuda {

// Starts the forward pass on a stream. Returns null, or what went wrong.
const char* divided_forward(const DividedArgs& call, void* stream);

// How many floats of memory the backward pass works with.
int64_t divided_backward_floats(const DividedArgs& call);
// Starts the backward pass.
const char* divided_backward(const DividedArgs& call, float* workspace, void* stream);

}  // namespace vidattn::cuda
