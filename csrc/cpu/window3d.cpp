// The native ops of the window family: reads the tensors, spreads the tasks over threads, and adds up what the tasks
// leave behind.
#include <algorithm>
#include <memory>

#include "dispatch.h"
#include "window3d_call.h"
#include "window3d_kernels.h"

namespace vidattn {
namespace {

const Window3dKernels& kernels(const Window3dArgs& a) {
  return kernels_for<Window3dKernels>(a.element, VIDATTN_KERNELS(window3d));
}

Window3dArgs read_call(Arguments& from) {
  const Tensor* seed;
  Window3dArgs a = read_window3d_call(from, seed);
  set_seed(a, seed);
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
