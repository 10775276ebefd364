// The native ops of the window family: reads the tensors, spreads the tasks over threads, and adds up what the tasks
// leave behind.
#include <algorithm>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "window3d_call.h"
#include "window3d_kernels.h"

namespace vidattn {
namespace {

const Window3dKernels& kernels(const Window3dArgs& a, bool backward) {
  return kernels_for<Window3dKernels>(a.element, backward, VIDATTN_KERNELS(window3d));
}

Window3dArgs read_call(Arguments& from) {
  const Tensor* seed;
  Window3dArgs a = read_window3d_call(from, seed);
  set_seed(a, seed);
  for (int64_t i = 0; i < a.type_groups; ++i)
    STD_TORCH_CHECK(a.window_types[i] >= 0 && a.window_types[i] < a.types, "a type of window that has no bias");
  return a;
}

// The windows type by type, in fixed ranges of one type.
struct Chunks {
  std::vector<int64_t> order, begin;  // where the windows are not in order as they are; else empty
  std::vector<int64_t> of_type;       // where the chunks of each type begin, and one past the last
};

Chunks cut(const Window3dArgs& a, bool dense) {
  Chunks chunks;
  std::vector<int64_t> sizes(a.window_types ? a.types : 1);
  const int64_t repeats = a.window_types ? a.groups / a.type_groups : a.groups;
  if (!a.window_types) sizes[0] = a.groups;
  for (int64_t i = 0; i < a.type_groups; ++i) sizes[a.window_types[i]] += repeats;
  const int64_t used = std::count_if(sizes.begin(), sizes.end(), [](int64_t size) { return size > 0; });
  // A partial sum belongs to fixed windows whatever the number of threads: the number of chunks depends on the shapes
  // and types alone. Enough of them to keep many threads busy (dense bias gradients are large, so fewer of those), and
  // at most 64 windows each, so that long sums in float32 do not lose digits.
  const int64_t tasks = ceil_div(dense ? 16 : 128, a.heads * used);
  int64_t first = 0;
  chunks.of_type.push_back(0);
  for (int64_t size : sizes) {
    const int64_t count = std::min(std::max(tasks, ceil_div(size, 64)), size);
    for (int64_t chunk = 0; a.window_types && chunk < count; ++chunk)
      chunks.begin.push_back(first + size * chunk / count);
    first += size;
    chunks.of_type.push_back(chunks.of_type.back() + count);
  }
  if (!a.window_types) return chunks;
  chunks.begin.push_back(first);
  std::vector<int64_t> next(sizes.size());  // place of the next window of a type
  for (size_t type = 1; type < sizes.size(); ++type) next[type] = next[type - 1] + sizes[type - 1];
  chunks.order.resize(a.groups);
  for (int64_t group = 0; group < a.groups; ++group)
    chunks.order[next[a.window_types[group % a.type_groups]]++] = group;
  return chunks;
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  Window3dArgs a = read_call(from);
  a.tensor[kOut] = token_tensor(from.tensor(), a.head_dim);
  a.lse = from.tensor().data_ptr();
  run(a, kernels(a, false), false, a.heads * a.groups);
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
  const bool dense = dbias && !a.bias_is_table;
  const Chunks cuts = cut(a, dense);
  a.chunks = cuts.of_type.back();
  if (a.window_types) a.order = cuts.order.data(), a.chunk_begin = cuts.begin.data();
  const int64_t types = static_cast<int64_t>(cuts.of_type.size()) - 1;
  bool direct = dense;  // one chunk a type: its sums are the gradient
  for (int64_t type = 0; type < types; ++type) direct &= cuts.of_type[type + 1] == type + 1;
  std::unique_ptr<T[]> dbias_partial, dpad_partial;
  if (dbias && !direct) dbias_partial.reset(new T[a.chunks * a.heads * a.bias_size]);
  if (dpad) dpad_partial.reset(new T[a.chunks * a.heads * 2 * a.head_dim]);
  a.dbias_partial = direct ? dbias : dbias_partial.get();
  a.dpad_partial = dpad_partial.get();
  run(a, kernels(a, true), true, a.heads * a.chunks);

  if (dbias && !direct)
    parallel_for(0, types * a.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t type = plane / a.heads, head = plane % a.heads, first = cuts.of_type[type];
        sum_chunks(dbias_partial.get() + (first * a.heads + head) * a.bias_size, cuts.of_type[type + 1] - first,
                   a.bias_size, a.heads * a.bias_size, dense ? dbias + plane * a.bias_size : dbias + head,
                   dense ? 1 : a.heads);
      }
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
  read_tokens(a, Tokens(from), kDq);
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
