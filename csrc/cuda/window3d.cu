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

template <class T>
auto kernel_for(int dim) {
  return dim == 32 ? attention_forward<T, 32, WindowGroup> : attention_forward<T, 64, WindowGroup>;
}

}  // namespace

const char* window3d_forward(const Window3dArgs& call, void* stream) {
  WindowArguments a{};
  a.call = call;
  a.stride_sets =
      same_strides(call.tensor[kQ], call.tensor[kK]) && same_strides(call.tensor[kQ], call.tensor[kV]) ? 1 : 3;
  const Slot keys[] = {kK, kV}, queries[] = {kQ};
  a.unit = unit_of(call, keys, 2), a.query_unit = unit_of(call, queries, 1);
  a.plan = plan_forward(call.tokens, call.head_dim, call.bias_is_table ? call.bias_size : 0, a.stride_sets,
                        gpu::shared_memory_limit());
  const float scale = float(call.scale);
  a.factor = scale * kLog2e, a.bias_scale = 1 / scale, a.mask_added = float(call.mask_value / call.scale);
  const bool masks = call.region_mask[0] || call.region_mask[1] || call.region_mask[2];
  const bool dense = call.mask || (call.bias && !call.bias_is_table);
  a.folds = scale >= 0x1p-10f && scale <= 0x1p10f && !dense && (!call.bias_is_table || a.plan.bias_in_shared) &&
            (!masks || a.mask_added == -INFINITY || (a.mask_added >= -0x1p20f && a.mask_added <= 0x1p20f));
  const auto kernel =
      call.element == Element::float16 ? kernel_for<__half>(a.plan.dim) : kernel_for<__nv_bfloat16>(a.plan.dim);
  return gpu::launch(kernel, dim3(uint32_t(call.heads * call.groups)), dim3(uint32_t(a.plan.threads)),
                     size_t(a.plan.shared_bytes), stream, a);
}

}  // namespace vidattn::cuda
