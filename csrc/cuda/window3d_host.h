// What the passes of windows find out about a call before they launch a kernel.
#pragma once
#include <cmath>

#include "window_tokens.cuh"

namespace vidattn::cuda {

// The largest of 16, 4 and 2 that all rows of a tensor start at a multiple of, and that head_dim fills.
inline int unit_of(const Window3dArgs& a, Slot slot) {
  const TokenTensor& x = a.tensor[slot];
  uint64_t bits = uint64_t(a.head_dim) * 2 | reinterpret_cast<uintptr_t>(x.data);
  if (is_of_keys(slot)) bits |= reinterpret_cast<uintptr_t>(a.pad_qkv);
  for (int64_t stride : x.stride) bits |= uint64_t(stride);
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
  if (stride < 0 || stride > INT32_MAX) return false;
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

// Gives the axes of a call an order: which of them take the places of depth, height and width.
inline void order_axes(WindowTokenArguments& a, const Window3dArgs& call, const int (&axes)[3]) {
  const int64_t token_step[3] = {call.grid[1] * call.grid[2], call.grid[2], 1};
  const int64_t heights = 2 * call.bias_window[1] - 1, widths = 2 * call.bias_window[2] - 1;
  const int64_t table_step[3] = {heights * widths, widths, 1};
  a.borders = a.middle_row = 0;
  for (int i = 0; i < 3; ++i) {
    const int axis = axes[i];
    a.call.grid[i] = call.grid[axis], a.call.window[i] = call.window[axis], a.call.shift[i] = call.shift[axis];
    a.call.count[i] = call.count[axis], a.call.region_mask[i] = call.region_mask[axis];
    for (int slot = 0; slot < kSlots; ++slot) a.call.tensor[slot].stride[i + 1] = call.tensor[slot].stride[axis + 1];
    a.count[i] = Divisor(call.count[axis]), a.padded[i] = int(call.count[axis] * call.window[axis]);
    a.borders |= call.region_mask[axis] << i;
    a.token_step[i] = int(token_step[axis]);
    if (!call.bias_is_table) continue;
    a.call.bias_window[i] = call.bias_window[axis], a.table_step[i] = int(table_step[axis]);
    a.middle_row += int((call.bias_window[axis] - 1) * table_step[axis]);
  }
  a.height = Divisor(a.call.window[1]), a.width = Divisor(a.call.window[2]);
  if (!call.bias_is_table) return;
  // In another order than that of the grid, the bias goes by the coordinates of the window.
  const bool in_order = axes[0] == 0 && axes[1] == 1;
  a.bias_height = Divisor(in_order ? call.bias_extent[0] : a.call.window[1]);
  a.bias_width = Divisor(in_order ? call.bias_extent[1] : a.call.window[2]);
  a.table_heights = Divisor(2 * a.call.bias_window[1] - 1), a.table_widths = Divisor(2 * a.call.bias_window[2] - 1);
}

// All that the tables of the tokens follow from; `slots`: the tensors whose rows are looked up.
inline void describe_tokens(WindowTokenArguments& a, const Window3dArgs& call, std::initializer_list<Slot> slots) {
  a.call = call, a.keys = int(call.tokens);
  for (Slot slot : slots) {
    a.unit[slot] = unit_of(call, slot), a.set_of[slot] = -1;
    if (has_token_stride(call, call.tensor[slot])) {
      a.plain |= uint32_t(a.unit[slot] == 16) << slot, a.token_stride[slot] = uint32_t(call.tensor[slot].stride[3]);
      continue;
    }
    int set = 0;
    while (set < a.stride_sets && !same_strides(call.tensor[slot], call.tensor[a.slot_of[set]])) ++set;
    if (set == a.stride_sets) a.slot_of[a.stride_sets++] = slot;
    a.set_of[slot] = set;
  }
  for (int slot = 0; slot < kSlots; ++slot)
    a.batch_stride[slot] = call.tensor[slot].stride[0], a.head_stride[slot] = call.tensor[slot].stride[4];
  a.batch_stride[kLogSums] = call.grid[0] * call.grid[1] * call.grid[2] * call.heads, a.head_stride[kLogSums] = 1;
  a.batch_stride[kDenseBias] = 0, a.head_stride[kDenseBias] = call.bias_size;
  a.heads = Divisor(call.heads);
  order_axes(a, call, {0, 1, 2});
  a.scale = float(call.scale), a.mask_value = float(call.mask_value);
  a.factor = a.scale * kLog2e, a.bias_scale = 1 / a.scale, a.mask_added = float(call.mask_value / call.scale);
}

// Puts the tables of so many tokens, a multiple of 16, behind each other from a place in shared memory on, and the bias
// behind them.
inline void place_tokens(WindowTokenArguments& a, int64_t slots, int64_t place, bool bias_rows) {
  a.slots = int(slots);
  a.offsets = int(place);
  a.tokens = a.offsets + 8 * a.slots * a.stride_sets;
  a.regions = a.tokens + 4 * a.slots;
  a.bias_rows = a.regions + 2 * a.slots;
  a.bias = a.bias_rows + (bias_rows ? 4 * a.slots : 0);
}

// The same of a shape for the planners.
inline WindowShape shape_of(const WindowTokenArguments& a) {
  const Window3dArgs& call = a.call;
  WindowShape shape{{call.window[0], call.window[1], call.window[2]}, call.head_dim};
  shape.plain_bias = has_plain_bias(call), shape.stride_sets = a.stride_sets;
  shape.blocks = call.heads * call.groups;
  if (!call.bias_is_table) {
    for (int64_t& tokens : shape.table_window) tokens = 1;
    for (int64_t& tokens : shape.bias_extent) tokens = 1;
    return shape;
  }
  shape.table_rows = call.bias_size;
  for (int axis = 0; axis < 3; ++axis) shape.table_window[axis] = call.bias_window[axis];
  for (int axis = 0; axis < 2; ++axis) shape.bias_extent[axis] = call.bias_extent[axis];
  return shape;
}

}  // namespace vidattn::cuda
