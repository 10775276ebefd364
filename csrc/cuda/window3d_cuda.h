// What ops.cpp calls.
#pragma once
#include "window3d_args.h"

namespace vidattn::cuda {

// Starts the forward pass on a stream. Returns null, or what went wrong.
const char* window3d_forward(const Window3dArgs& call, void* stream);

}  // namespace vidattn::cuda
