// Shifted-window 3D attention on CUDA: which kernel runs a call, and how.
#include "window3d_cuda.h"

#include "forward.cuh"
#include "window3d.cuh"
#include "window3d_host.h"

namespace vidattn::cuda {
namespace {

// Of the registers of a multiprocessor, a thread may have its share of those of most_warps: 168 or 255.
template <class T, int kDim>
__global__ void __launch_bounds__(32 * most_warps(kDim))
    window_forward(const __grid_constant__ WindowArguments arguments) {
  attention_forward<T, kDim, WindowGroup<false>, 6>(arguments);
}

template <class T, int kDim>
__global__ void __launch_bounds__(32 * most_warps(kDim))
    depth_fastest_window_forward(const __grid_constant__ WindowArguments arguments) {
  attention_forward<T, kDim, WindowGroup<true>, 7>(arguments);
}

template <class T>
auto kernel_for(const ForwardPlan& plan) {
  if (plan.depth_fastest)
    return plan.dim == 32 ? depth_fastest_window_forward<T, 32> : depth_fastest_window_forward<T, 64>;
  return plan.dim == 32 ? window_forward<T, 32> : window_forward<T, 64>;
}

}  // namespace

const char* window3d_forward(const Window3dArgs& call, void* stream) {
  WindowArguments a{};
  a.call = call;
  a.stride_sets =
      same_strides(call.tensor[kQ], call.tensor[kK]) && same_strides(call.tensor[kQ], call.tensor[kV]) ? 1 : 3;
  const Slot keys[] = {kK, kV}, queries[] = {kQ};
  a.unit = unit_of(call, keys, 2), a.query_unit = unit_of(call, queries, 1);
  WindowShape shape{{call.window[0], call.window[1], call.window[2]}, call.head_dim};
  shape.table_rows = call.bias_is_table ? call.bias_size : 0;
  shape.plain_bias = has_plain_bias(call);
  shape.stride_sets = a.stride_sets;
  shape.blocks = call.heads * call.groups;
  for (int axis = 0; axis < 3; ++axis) shape.table_window[axis] = call.bias_window[axis];
  for (int axis = 0; axis < 2; ++axis) shape.bias_extent[axis] = call.bias_extent[axis];
  const int limit = gpu::shared_memory_limit();
  a.plan = plan_forward(shape, limit);
  if (a.plan.shared_bytes > limit || a.plan.block_keys <= 0) return "a block has too little shared memory";
  a.tables = a.plan.key_rows() * a.plan.dim * 4 + int(kBlockBytes), a.slots = int(round_up(call.tokens, 16));
  a.heads = Divisor(call.heads), a.splits = Divisor(a.plan.splits), a.warps = Divisor(a.plan.threads / 32);
  a.shares = Divisor(a.plan.splits * (a.plan.threads / 32)), a.height = Divisor(call.window[1]);
  a.width = Divisor(call.window[2]);
  a.lines = Divisor(2 * call.window[1] - 1), a.columns = Divisor(2 * call.window[2] - 1);
  for (int axis = 0; axis < 3; ++axis) a.count[axis] = Divisor(call.count[axis]);
  if (call.bias_is_table) {
    a.bias_height = Divisor(call.bias_extent[0]), a.bias_width = Divisor(call.bias_extent[1]);
    a.table_heights = Divisor(2 * call.bias_window[1] - 1), a.table_widths = Divisor(2 * call.bias_window[2] - 1);
  }
  const float scale = float(call.scale);
  a.factor = scale * kLog2e, a.bias_scale = 1 / scale, a.mask_added = float(call.mask_value / call.scale);
  for (int axis = 0; axis < 3; ++axis) a.borders |= call.region_mask[axis] << axis;
  const int64_t* table = call.bias_window;
  if (call.bias_is_table)
    a.bias_row = int((table[0] - 1) * a.plan.pitch.plane + (table[1] - 1) * a.plan.pitch.row + table[2] - 1);
  a.scale = scale, a.mask_value = float(call.mask_value);
  a.hiding_room = 0.5f * (-kNothing / a.factor - a.mask_added), a.all_chunks = (1u << call.tokens / 56 % 32) - 1;
  a.folds = has_moderate_numbers(call) && a.plan.bias_floats > 0;
  const auto kernel = call.element == Element::float16 ? kernel_for<__half>(a.plan) : kernel_for<__nv_bfloat16>(a.plan);
  return gpu::launch(kernel, dim3(uint32_t(shape.blocks * a.plan.splits)), dim3(uint32_t(a.plan.threads)),
                     size_t(a.plan.shared_bytes), stream, a);
}

}  // namespace vidattn::cuda
