// The native ops of the window family on CUDA: reads the tensors and starts the kernels.
#include <device.h>
#include "plan.h"
#include "window3d_call.h"
#include "window3d_cuda.h"

namespace vidattn::cuda {
namespace {

void check(const Window3dArgs& a) {
  STD_TORCH_CHECK(a.element == Element::float16 || a.element == Element::bfloat16, "expected float16 or bfloat16");
  STD_TORCH_CHECK(a.head_dim <= kMaxHeadDim && a.tokens <= kMaxTokens, "expected head_dim up to ", kMaxHeadDim,
                  " and windows up to ", kMaxTokens, " tokens, got ", a.head_dim, " and ", a.tokens);
  STD_TORCH_CHECK(a.dropout_p == 0, "dropout is not implemented");
  STD_TORCH_CHECK(!a.regions && !a.shift_first && a.before[0] + a.before[1] + a.before[2] == 0,
                  "regions, and padding in front or after the shift, are not implemented");
  STD_TORCH_CHECK(a.heads * a.groups <= INT32_MAX && a.grid[0] * a.grid[1] * a.grid[2] <= INT32_MAX,
                  "more than 2^31 - 1 blocks, or tokens of one grid");
  STD_TORCH_CHECK(a.groups > 0 && a.heads > 0, "expected at least one window");
}

void window3d_forward_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  const Tensor* seed;
  Window3dArgs a = read_window3d_call(from, seed);
  const Tensor& out = from.tensor();
  a.tensor[kOut] = token_tensor(out, a.head_dim);
  a.lse = from.tensor().data_ptr();
  check(a);
  const OnDeviceOf device(out);
  const char* error = window3d_forward(a, device.stream());
  STD_TORCH_CHECK(!error, "starting the window kernel failed: ", error ? error : "");
}

void window3d_backward_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  const Tensor* seed;
  Window3dArgs a = read_window3d_call(from, seed);
  a.tensor[kDout] = token_tensor(from.tensor(), a.head_dim);
  const Tensor *out = from.maybe_tensor(), *lse = from.maybe_tensor();
  STD_TORCH_CHECK(out && lse, "expected the context and log-sum-exp of the forward pass");
  a.tensor[kOut] = token_tensor(*out, a.head_dim);
  a.lse = lse->data_ptr();
  read_tokens(a, Tokens(from), kDq);
  const Tensor *dbias = from.maybe_tensor(), *dpad = from.maybe_tensor();
  check(a);
  STD_TORCH_CHECK(!dbias || a.bias_is_table, "the gradient of a dense bias is not implemented");
  SharedGradients to{};
  if (dbias) {
    to.table = static_cast<float*>(dbias->data_ptr());
    to.table_row_stride = dbias->stride(0), to.table_head_stride = dbias->stride(1);
  }
  if (dpad) to.pad = static_cast<float*>(dpad->data_ptr());
  OnDeviceOf device(*out);
  float* const workspace = device.new_floats(window3d_backward_floats(a, dbias, dpad));
  const char* error = window3d_backward(a, to, workspace, device.stream());
  STD_TORCH_CHECK(!error, "starting the window kernel failed: ", error ? error : "");
}

}  // namespace
}  // namespace vidattn::cuda

#define VIDATTN_REGISTER(...) STABLE_TORCH_LIBRARY_IMPL(__VA_ARGS__)
VIDATTN_REGISTER(VIDATTN_CUDA_LIBRARY, m) {
  m.impl("_window3d_attention_forward", &vidattn::cuda::window3d_forward_op);
  m.impl("_window3d_attention_backward", &vidattn::cuda::window3d_backward_op);
}
