// The native ops of the window family: reads the tensors, spreads the tasks over threads, and adds up what the tasks
// leave behind.
#include <algorithm>
#include <memory>

#include "dispatch.h"
#include "window3d_args.h"

namespace vidattn {
namespace {

const Window3dKernels& kernels(const Window3dArgs& a) {
  return kernels_for<Window3dKernels>(a.element, VIDATTN_KERNELS(window3d));
}

// A token tensor (B, D, H, W, h, d), or its last two dimensions merged (B, D, H, W, h * d).
TokenTensor token_tensor(const Tensor& t, int64_t head_dim) {
  TokenTensor view;
  view.data = static_cast<char*>(t.data_ptr());
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(t.stride(-1) == 1 || t.size(-1) == 1, "the last dimension must be contiguous");
  for (int axis = 0; axis < 4; ++axis) view.stride[axis] = t.stride(axis) * bytes;
  view.stride[4] = (t.dim() == 5 ? head_dim : t.stride(4)) * bytes;
  return view;
}

// Reads the fields of WindowCall in vidattn/calls.py, which says what they are.
Window3dArgs read_call(Arguments& from) {
  Window3dArgs a{};
  const Tokens tokens(from);
  const Tensor* bias = from.maybe_tensor();
  const Ints bias_window = from.take<Ints>();
  const Tensor *mask = from.maybe_tensor(), *pad_qkv = from.maybe_tensor(), *seed = from.maybe_tensor();
  const Ints window = from.take<Ints>(), shift = from.take<Ints>(), wrap = from.take<Ints>();
  a.scale = from.take<double>(), a.mask_value = from.take<double>(), a.dropout_p = from.take<double>();

  const Tensor& q = tokens.q;
  STD_TORCH_CHECK(q.dim() == 6 && window.size() == 3 && shift.size() == 3 && wrap.size() == 3,
                  "expected q of 6 dimensions and 3 axes");
  set_shape(a, q);
  set_seed(a, seed);
  a.batch = q.size(0);
  a.tokens = 1, a.groups = a.batch;
  for (int axis = 0; axis < 3; ++axis) {
    a.grid[axis] = q.size(axis + 1);
    a.window[axis] = window[axis];
    a.shift[axis] = shift[axis];
    STD_TORCH_CHECK(window[axis] >= 1 && shift[axis] >= 0 && shift[axis] < window[axis],
                    "expected 0 <= shift < window");
    a.count[axis] = ceil_div(a.grid[axis], window[axis]);
    a.region_mask[axis] = shift[axis] > 0 && !wrap[axis];
    a.tokens *= window[axis];
    a.groups *= a.count[axis];
  }
  a.tensor[kQ] = token_tensor(q, a.head_dim);
  a.tensor[kK] = token_tensor(tokens.k, a.head_dim);
  a.tensor[kV] = token_tensor(tokens.v, a.head_dim);
  if (pad_qkv) a.pad_qkv = static_cast<const char*>(pad_qkv->data_ptr());
  if (bias) {
    a.bias = bias->data_ptr();
    a.bias_is_table = !bias_window.empty();
    a.bias_size = bias->numel() / a.heads;
    if (a.bias_is_table) {
      STD_TORCH_CHECK(bias_window.size() == 5, "expected bias_window of 5 numbers");
      int64_t rows = 1;
      for (int axis = 0; axis < 3; ++axis) rows *= 2 * (a.bias_window[axis] = bias_window[axis]) - 1;
      a.bias_extent[0] = bias_window[3], a.bias_extent[1] = bias_window[4];
      STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == rows && bias->size(1) == a.heads,
                      "bias table of the wrong shape");
      const int64_t slice = a.bias_extent[0] * a.bias_extent[1];
      STD_TORCH_CHECK(ceil_div(a.tokens, slice) <= a.bias_window[0], "window larger than the bias table's");
    } else {
      STD_TORCH_CHECK(a.bias_size == a.tokens * a.tokens, "dense bias of the wrong shape");
    }
  }
  if (mask) a.mask = mask->data_ptr(), a.mask_groups = mask->size(0);
  return a;
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  Window3dArgs a = read_call(from);
  a.tensor[kOut] = token_tensor(from.tensor(), a.head_dim);
  a.lse = from.tensor().data_ptr();
  run(a, kernels(a), false, a.heads * a.groups, kernels(a).forward);
}

// to[i] = sum over the chunks of from[chunk][i], in order.
template <class T>
void sum_chunks(const T* from, int64_t chunks, int64_t size, int64_t stride, T* to, int64_t to_step) {
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += from[c * stride + i];
    to[i * to_step] = static_cast<T>(sum);
  }
}

template <class T>
void backward_as(Window3dArgs& a, T* dbias, T* dpad) {
  // A partial sum belongs to fixed windows whatever the number of threads: the number of chunks depends on the shapes
  // alone. Enough of them to keep many threads busy (dense bias gradients are large, so fewer of those), and at most 64
  // windows each, so that long sums in float32 do not lose digits.
  const int64_t tasks = dbias && !a.bias_is_table ? 16 : 128;
  a.chunks = std::min(std::max(ceil_div(tasks, a.heads), ceil_div(a.groups, 64)), a.groups);
  std::unique_ptr<T[]> dbias_partial, dpad_partial;
  const bool direct = dbias && !a.bias_is_table && a.chunks == 1;
  if (dbias && !direct) dbias_partial.reset(new T[a.chunks * a.heads * a.bias_size]);
  if (dpad) dpad_partial.reset(new T[a.chunks * a.heads * 2 * a.head_dim]);
  a.dbias_partial = direct ? dbias : dbias_partial.get();
  a.dpad_partial = dpad_partial.get();
  run(a, kernels(a), true, a.heads * a.chunks, kernels(a).backward);

  if (dbias && !direct)
    torch::stable::parallel_for(0, a.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head)
        sum_chunks(dbias_partial.get() + head * a.bias_size, a.chunks, a.bias_size, a.heads * a.bias_size,
                   a.bias_is_table ? dbias + head : dbias + head * a.bias_size, a.bias_is_table ? a.heads : 1);
    });
  if (dpad) {
    const int64_t size = a.heads * a.head_dim, stride = 2 * size;
    std::fill(dpad, dpad + size, T(0));  // padding queries have no output, hence no gradient
    for (int64_t head = 0; head < a.heads; ++head)
      for (int64_t which = 0; which < 2; ++which)
        sum_chunks(dpad_partial.get() + (head * 2 + which) * a.head_dim, a.chunks, a.head_dim, stride,
                   dpad + (which + 1) * size + head * a.head_dim, 1);
  }
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  Window3dArgs a = read_call(from);
  a.tensor[kDout] = token_tensor(from.tensor(), a.head_dim);
  from.maybe_tensor(), from.maybe_tensor();  // out and lse: here a query's scores are at hand all at once
  for (Slot slot : {kDq, kDk, kDv}) a.tensor[slot] = token_tensor(from.tensor(), a.head_dim);
  const Tensor *dbias = from.maybe_tensor(), *dpad = from.maybe_tensor();
  void *dbias_data = dbias ? dbias->data_ptr() : nullptr, *dpad_data = dpad ? dpad->data_ptr() : nullptr;
  if (a.element == Element::float64)
    backward_as(a, static_cast<double*>(dbias_data), static_cast<double*>(dpad_data));
  else
    backward_as(a, static_cast<float*>(dbias_data), static_cast<float*>(dpad_data));
}

}  // namespace
}  // namespace vidattn

STABLE_TORCH_LIBRARY_IMPL(vidattn, CPU, m) {
  m.impl("_window3d_attention_forward", &vidattn::forward);
  m.impl("_window3d_attention_backward", &vidattn::backward);
}
