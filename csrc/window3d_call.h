// How the native ops of the window family read their arguments.
#pragma once
#include "arguments.h"
#include "window3d_args.h"

namespace vidattn {

// A token tensor (B, D, H, W, h, d), or its last two dimensions merged (B, D, H, W, h * d).
inline TokenTensor token_tensor(const Tensor& t, int64_t head_dim) {
  TokenTensor view;
  view.data = static_cast<char*>(t.data_ptr());
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(t.stride(-1) == 1 || t.size(-1) == 1, "the last dimension must be contiguous");
  for (int axis = 0; axis < 4; ++axis) view.stride[axis] = t.stride(axis) * bytes;
  view.stride[4] = (t.dim() == 5 ? head_dim : t.stride(-2)) * bytes;
  return view;
}

inline void read_tokens(Window3dArgs& a, const Tokens& tokens, Slot first) {
  tokens.read(&a.tensor[first], [&](const Tensor& t) { return token_tensor(t, a.head_dim); });
}

// Reads the fields of WindowCall in vidattn/calls.py, which says what they are. The seed lies on the device of q, so
// whoever can reads it.
inline Window3dArgs read_window3d_call(Arguments& from, const Tensor*& seed) {
  Window3dArgs a{};
  const Tokens tokens(from);
  const Tensor* bias = from.maybe_tensor();
  const Ints bias_window = from.take<Ints>();
  const Tensor *mask = from.maybe_tensor(), *pad_qkv = from.maybe_tensor();
  seed = from.maybe_tensor();
  const Ints window = from.take<Ints>(), shift = from.take<Ints>(), wrap = from.take<Ints>();
  a.scale = from.take<double>(), a.mask_value = from.take<double>(), a.dropout_p = from.take<double>();
  const Tensor *window_types = from.maybe_tensor(), *regions = from.maybe_tensor();
  const Ints padding = from.take<Ints>();
  a.shift_first = from.take<bool>();

  const Tensor& q = tokens.q;
  STD_TORCH_CHECK(tokens.dim() == 6 && window.size() == 3 && shift.size() == 3 && wrap.size() == 3 &&
                      (padding.empty() || padding.size() == 6),
                  "expected q of 6 dimensions and 3 axes");
  set_shape(a, q);
  a.batch = q.size(0);
  a.tokens = 1, a.groups = a.batch;
  for (int axis = 0; axis < 3; ++axis) {
    a.grid[axis] = q.size(axis + 1);
    a.window[axis] = window[axis];
    a.shift[axis] = shift[axis];
    STD_TORCH_CHECK(window[axis] >= 1 && shift[axis] >= 0 && shift[axis] < window[axis],
                    "expected 0 <= shift < window");
    a.before[axis] = padding.empty() ? 0 : padding[2 * axis];
    a.count[axis] =
        ceil_div(a.before[axis] + a.grid[axis] + (padding.empty() ? 0 : padding[2 * axis + 1]), window[axis]);
    a.border[axis] = (a.shift_first ? a.before[axis] + a.grid[axis] : a.count[axis] * window[axis]) - shift[axis];
    a.region_mask[axis] = shift[axis] > 0 && !wrap[axis] && !regions;
    a.tokens *= window[axis];
    a.groups *= a.count[axis];
  }
  read_tokens(a, tokens, kQ);
  if (pad_qkv) a.pad_qkv = static_cast<const char*>(pad_qkv->data_ptr());
  if (bias) {
    a.bias = bias->data_ptr();
    a.bias_is_table = !bias_window.empty();
    a.types = window_types ? bias->size(0) : 1;
    a.bias_size = bias->numel() / (a.heads * a.types);
    if (a.bias_is_table) {
      STD_TORCH_CHECK(bias_window.size() == 5, "expected bias_window of 5 numbers");
      int64_t rows = 1;
      for (int axis = 0; axis < 3; ++axis) rows *= 2 * (a.bias_window[axis] = bias_window[axis]) - 1;
      a.bias_extent[0] = bias_window[3], a.bias_extent[1] = bias_window[4];
      STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == rows && bias->size(1) == a.heads,
                      "bias table of the wrong shape");
      a.bias_row_stride = bias->stride(0), a.bias_head_stride = bias->stride(1);
      const int64_t slice = a.bias_extent[0] * a.bias_extent[1];
      STD_TORCH_CHECK(ceil_div(a.tokens, slice) <= a.bias_window[0], "window larger than the bias table's");
    } else {
      STD_TORCH_CHECK(a.bias_size == a.tokens * a.tokens, "dense bias of the wrong shape");
    }
  }
  if (window_types) {
    STD_TORCH_CHECK(bias && !a.bias_is_table && window_types->numel() > 0 && a.groups % window_types->numel() == 0,
                    "types of windows that have no bias");
    a.window_types = static_cast<const int32_t*>(window_types->data_ptr());
    a.type_groups = window_types->numel();
  }
  if (regions) {
    STD_TORCH_CHECK(regions->numel() == a.count[0] * a.count[1] * a.count[2] * a.tokens, "regions of another grid");
    a.regions = static_cast<const int64_t*>(regions->data_ptr());
  }
  if (mask) a.mask = mask->data_ptr(), a.mask_groups = mask->size(0);
  return a;
}

}  // namespace vidattn
