// Shifted-window 3D attention on CUDA: which kernel runs a call, and how.
#include "window3d_cuda.h"

#include "forward.cuh"
#include "window3d.cuh"

namespace vidattn::cuda {
namespace {

bool same_strides(const TokenTensor& x, const TokenTensor& y) {
  for (int i = 0; i < 5; ++i)
    if (x.stride[i] != y.stride[i]) return false;
  return true;
}

// The largest of 16, 4 and 2 that all rows of these tensors start at a multiple of, and that head_dim fills.
int unit_of(const Window3dArgs& a, const Slot* slots, int count) {
  uint64_t bits = uint64_t(a.head_dim) * 2 | reinterpret_cast<uintptr_t>(a.pad_qkv);
  for (int i = 0; i < count; ++i) {
    bits |= reinterpret_cast<uintptr_t>(a.tensor[slots[i]].data);
    for (int64_t stride : a.tensor[slots[i]].stride) bits |= uint64_t(stride);
  }
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
}

template <class T, int kDim>
__global__ void __launch_bounds__(256, kDim == 32 ? 2 : 1)
    window_forward(const __grid_constant__ WindowArguments arguments) {
  attention_forward<T, kDim, WindowGroup<false>, 1, 8>(arguments);
}

template <class T, int kDim>
__global__ void __launch_bounds__(192, kDim == 32 ? 2 : 1)
    depth_fastest_window_forward(const __grid_constant__ WindowArguments arguments) {
  attention_forward<T, kDim, WindowGroup<true>, kDim == 32 ? 2 : 1, 7>(arguments);
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
  const bool dense = call.mask || (call.bias && !call.bias_is_table);
  WindowShape shape{{call.window[0], call.window[1], call.window[2]}, call.head_dim};
  shape.table_rows = call.bias_is_table ? call.bias_size : 0;
  shape.plain_bias =
      !dense && (!call.bias || (call.bias_extent[0] == call.window[1] && call.bias_extent[1] == call.window[2]));
  shape.stride_sets = a.stride_sets;
  a.plan = plan_forward(shape, gpu::shared_memory_limit());
  a.tables = a.plan.block_keys * a.plan.dim * 4, a.slots = int(round_up(call.tokens, 16));
  const float scale = float(call.scale);
  a.factor = scale * kLog2e, a.bias_scale = 1 / scale, a.mask_added = float(call.mask_value / call.scale);
  const bool masks = call.region_mask[0] || call.region_mask[1] || call.region_mask[2];
  a.folds = scale >= 0x1p-10f && scale <= 0x1p10f && !dense && a.plan.bias_floats > 0 &&
            (!masks || a.mask_added == -INFINITY || (a.mask_added >= -0x1p20f && a.mask_added <= 0x1p20f));
  const auto kernel = call.element == Element::float16 ? kernel_for<__half>(a.plan) : kernel_for<__nv_bfloat16>(a.plan);
  return gpu::launch(kernel, dim3(uint32_t(call.heads * call.groups)), dim3(uint32_t(a.plan.threads)),
                     size_t(a.plan.shared_bytes), stream, a);
}

}  // namespace vidattn::cuda
