// What the passes of windows find out about a call before they launch a kernel.
#pragma once
#include <cmath>

#include "window3d_args.h"

namespace vidattn::cuda {

// The largest of 16, 4 and 2 that all rows of these tensors start at a multiple of, and that head_dim fills.
inline int unit_of(const Window3dArgs& a, const Slot* slots, int count) {
  uint64_t bits = uint64_t(a.head_dim) * 2 | reinterpret_cast<uintptr_t>(a.pad_qkv);
  for (int i = 0; i < count; ++i) {
    bits |= reinterpret_cast<uintptr_t>(a.tensor[slots[i]].data);
    for (int64_t stride : a.tensor[slots[i]].stride) bits |= uint64_t(stride);
  }
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
}

inline bool same_strides(const TokenTensor& x, const TokenTensor& y) {
  for (int i = 0; i < 5; ++i)
    if (x.stride[i] != y.stride[i]) return false;
  return true;
}

// Whether one stride, of 32 bits, counts through the grid.
inline bool has_token_stride(const Window3dArgs& a, const TokenTensor& x) {
  int64_t stride = x.stride[3];
  if (stride != int32_t(stride)) return false;
  for (int axis = 2; axis >= 0; --axis) {
    if (a.grid[axis] > 1 && x.stride[axis + 1] != stride) return false;
    stride *= a.grid[axis];
  }
  return true;
}

inline bool is_dense(const Window3dArgs& call) {
  return call.mask || (call.bias && !call.bias_is_table);
}

// Whether the bias of a pair goes by the coordinates of this window.
inline bool has_plain_bias(const Window3dArgs& call) {
  return !is_dense(call) &&
         (!call.bias || (call.bias_extent[0] == call.window[1] && call.bias_extent[1] == call.window[2]));
}

// Whether what is added to the scores may be part of the products, as far as the host knows the numbers.
inline bool has_moderate_numbers(const Window3dArgs& call) {
  const float scale = float(call.scale), mask = float(call.mask_value / call.scale);
  const bool masks = call.region_mask[0] || call.region_mask[1] || call.region_mask[2];
  return scale >= 0x1p-10f && scale <= 0x1p10f && !is_dense(call) &&
         (!masks || mask == -INFINITY || (mask >= -0x1p20f && mask <= 0x1p20f));
}

}  // namespace vidattn::cuda
