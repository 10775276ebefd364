// The backward pass of shifted-window 3D attention on CUDA: which kernel runs a call, and how.
#include "backward.cuh"
#include "reduce.cuh"
#include "window3d_cuda.h"
#include "window3d_gradient.cuh"
#include "window3d_host.h"

namespace vidattn::cuda {
namespace {

template <class T, int kDim>
__global__ void __launch_bounds__(32 * kMaxBackwardWarps, 1)
    window_backward(const __grid_constant__ WindowGradientArguments arguments) {
  attention_backward<T, kDim, WindowGradientGroup<false>, kDim == 32 ? 32 : 16, 32>(arguments);
}

template <class T>
WindowBackwardKernel kernel_for(const BackwardPlan& plan) {
  return plan.dim == 32 ? window_backward<T, 32> : window_backward<T, 64>;
}

// All that shapes and pointers decide.
WindowGradientArguments arguments_of(const Window3dArgs& call, bool table_gradient, bool pad_gradient) {
  WindowGradientArguments a{};
  describe_tokens(a, call, {kQ, kK, kV, kDout, kOut, kDq, kDk, kDv});
  a.dout_unit = a.unit[kDout] < a.unit[kOut] ? a.unit[kDout] : a.unit[kOut];
  a.gradient_unit = 16;
  for (Slot slot : {kDq, kDk, kDv}) a.gradient_unit = a.unit[slot] < a.gradient_unit ? a.unit[slot] : a.gradient_unit;
  BackwardShape shape{shape_of(a)};
  shape.table_gradient = table_gradient, shape.pad_gradient = a.pad_gradient = pad_gradient;
  shape.aligned_rows = a.plain == (1u << kSlots) - 1;
  a.backward = plan_backward(shape, gpu::shared_memory_limit());
  const BackwardPlan& plan = a.backward;
  order_axes(a, call, plan.axes);
  if (plan.depth_fastest) a.keys = plan.block_keys;
  a.bases = kBasesPlace;
  place_tokens(a, round_up(a.keys, 32), plan.tokens, true);
  a.whole_rows = call.tokens <= kWholeRowTokens && plan.blocks == 1;  // all keys are there
  a.shares = backward_shares(call.groups, call.heads, plan, table_gradient ? call.bias_size : 0);
  a.share_groups = int(call.groups / a.shares), a.longer_shares = int(call.groups % a.shares);
  a.folds = has_moderate_numbers(call) && plan.bias_floats > 0;
  return a;
}

// Tells the kernel where its sums lie in a workspace. Returns how many floats that has.
int64_t place_sums(WindowGradientArguments& a, float* workspace) {
  const BackwardPlan& plan = a.backward;
  const int64_t heads = a.call.heads, blocks = a.shares * heads, warps = plan.threads / 32;
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* place = workspace + used;
    used += round_up(floats, 4);
    return floats > 0 ? place : nullptr;
  };
  a.dq_sums = take(plan.blocks > 1 ? blocks * a.slots * plan.dim : 0);
  a.table_sums = take(plan.table_is_shared ? 0 : blocks * warps * plan.table_floats);
  a.table_parts = take(plan.table_floats > 0 ? blocks * a.call.bias_size : 0);
  a.pad_parts = take(a.pad_gradient ? 3 * a.shares * heads * a.call.head_dim : 0);
  return used;
}

}  // namespace

int64_t window3d_backward_floats(const Window3dArgs& call, bool table_gradient, bool pad_gradient) {
  WindowGradientArguments a = arguments_of(call, table_gradient, pad_gradient);
  return place_sums(a, nullptr);
}

const char* window3d_backward(const Window3dArgs& call, const SharedGradients& to, float* workspace, void* stream) {
  WindowGradientArguments a = arguments_of(call, to.table, to.pad);
  if (a.backward.shared_bytes > gpu::shared_memory_limit()) return "a block has too little shared memory";
  place_sums(a, workspace);
  const bool is_half = call.element == Element::float16;
  const auto kernel = a.backward.depth_fastest  ? depth_fastest_kernel(call.element)
                      : a.backward.short_window ? short_window_kernel(call.element, a.backward)
                      : is_half                 ? kernel_for<__half>(a.backward)
                                                : kernel_for<__nv_bfloat16>(a.backward);
  const char* error = gpu::launch(kernel, dim3(uint32_t(call.heads * a.shares)), dim3(uint32_t(a.backward.threads)),
                                  size_t(a.backward.shared_bytes), stream, a);
  if (!error && to.table)
    error = launch_sum(
        {a.table_parts, to.table, a.shares, call.heads, call.bias_size, to.table_head_stride, to.table_row_stride},
        stream);
  if (!error && to.pad) {
    const int64_t size = 3 * call.heads * call.head_dim;
    error = launch_sum({a.pad_parts, to.pad, a.shares, 1, size, size, 1}, stream);
  }
  return error;
}

}  // namespace vidattn::cuda
