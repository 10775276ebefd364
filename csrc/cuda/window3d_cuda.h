// What window3d_ops.cpp calls.
#pragma once
#include "window3d_args.h"

namespace vidattn::cuda {

// Starts the forward pass on a stream. Returns null, or what went wrong.
const char* window3d_forward(const Window3dArgs& call, void* stream);

// Gradients that all windows add to, float32; null if they are not wanted.
struct SharedGradients {
  float* table;  // (rows, heads)
  int64_t table_row_stride, table_head_stride;
  float* pad;  // (3, heads, head_dim)
};

// How many floats of memory the backward pass works with.
int64_t window3d_backward_floats(const Window3dArgs& call, bool table_gradient, bool pad_gradient);
// Starts the backward pass.
const char* window3d_backward(const Window3dArgs& call, const SharedGradients& to, float* workspace, void* stream);

}  // namespace vidattn::cuda
