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

// Finds the different strides among tensors. One through which one stride counts needs no set.
void find_stride_sets(WindowGradientArguments& a, const Slot* slots, int count) {
  a.stride_sets = 0;
  for (int i = 0; i < count; ++i) {
    a.set_of[slots[i]] = -1;
    if (has_token_stride(a.call, a.call.tensor[slots[i]])) continue;
    int set = 0;
    while (set < a.stride_sets && !same_strides(a.call.tensor[slots[i]], a.call.tensor[a.slot_of[set]])) ++set;
    if (set == a.stride_sets) a.slot_of[a.stride_sets++] = slots[i];
    a.set_of[slots[i]] = set;
  }
}

// Gives the axes of a call another order. What counts tokens and rows of the table has its steps beside.
void order_axes(WindowGradientArguments& a, const int (&axes)[3]) {
  const Window3dArgs given = a.call;
  for (int slot = 0; slot < kSlots; ++slot) a.token_stride[slot] = int(given.tensor[slot].stride[3]);
  int64_t token_step[3] = {given.grid[1] * given.grid[2], given.grid[2], 1};
  const int64_t height = 2 * given.bias_window[1] - 1, width = 2 * given.bias_window[2] - 1;
  int64_t table_step[3] = {height * width, width, 1};
  for (int i = 0; i < 3; ++i) {
    const int axis = axes[i];
    a.call.grid[i] = given.grid[axis], a.call.window[i] = given.window[axis], a.call.shift[i] = given.shift[axis];
    a.call.count[i] = given.count[axis], a.call.region_mask[i] = given.region_mask[axis];
    a.call.bias_window[i] = given.bias_window[axis];
    for (int slot = 0; slot < kSlots; ++slot) a.call.tensor[slot].stride[i + 1] = given.tensor[slot].stride[axis + 1];
    a.token_step[i] = int(token_step[axis]), a.table_step[i] = int(table_step[axis]);
    if (given.bias_is_table) a.middle_row += int((given.bias_window[axis] - 1) * table_step[axis]);
  }
}

// All that shapes and pointers decide.
WindowGradientArguments arguments_of(const Window3dArgs& call, bool table_gradient, bool pad_gradient) {
  WindowGradientArguments a{};
  a.call = call;
  const Slot all[] = {kQ, kK, kV, kDout, kDq, kDk, kDv}, keys[] = {kK, kV}, queries[] = {kQ}, rows[] = {kDout, kOut},
             gradients[] = {kDq, kDk, kDv};
  find_stride_sets(a, all, 7);
  a.unit = unit_of(call, keys, 2), a.query_unit = unit_of(call, queries, 1), a.dout_unit = unit_of(call, rows, 2);
  a.gradient_unit = unit_of(call, gradients, 3);
  BackwardShape shape{};
  for (int i = 0; i < 3; ++i) shape.window[i] = call.window[i];
  shape.head_dim = call.head_dim, shape.stride_sets = a.stride_sets;
  shape.table_rows = call.bias_is_table ? call.bias_size : 0;
  shape.plain_bias = has_plain_bias(call);
  for (int i = 0; i < 3; ++i) shape.table_window[i] = call.bias_is_table ? call.bias_window[i] : 1;
  for (int i = 0; i < 2; ++i) shape.bias_extent[i] = call.bias_is_table ? call.bias_extent[i] : 1;
  shape.table_gradient = table_gradient, shape.pad_gradient = a.pad_gradient = pad_gradient;
  a.backward = plan_backward(shape, gpu::shared_memory_limit());
  const BackwardPlan& plan = a.backward;
  order_axes(a, plan.axes);
  a.tables = plan.tokens, a.slots = int(round_up(plan.depth_fastest ? plan.block_keys : call.tokens, 32));
  a.whole_rows = call.tokens <= kWholeRowTokens;
  a.shares = backward_shares(call.groups, call.heads, plan, table_gradient ? call.bias_size : 0);
  a.share_groups = int(call.groups / a.shares), a.longer_shares = int(call.groups % a.shares);
  a.heads = Divisor(call.heads), a.height = Divisor(a.call.window[1]), a.width = Divisor(a.call.window[2]);
  for (int axis = 0; axis < 3; ++axis) a.count[axis] = Divisor(a.call.count[axis]);
  if (call.bias_is_table) {
    a.bias_height = Divisor(call.bias_extent[0]), a.bias_width = Divisor(call.bias_extent[1]);
    a.table_heights = Divisor(2 * a.call.bias_window[1] - 1), a.table_widths = Divisor(2 * a.call.bias_window[2] - 1);
  }
  const float scale = float(call.scale);
  a.factor = scale * kLog2e, a.bias_scale = 1 / scale, a.mask_added = float(call.mask_value / call.scale);
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
