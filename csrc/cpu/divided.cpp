// The native ops of attention over time and over space: reads the tensors, cuts them into sequences along one axis
// after the other, and spreads those over threads.
#include <memory>

#include "dispatch.h"
#include "divided_call.h"
#include "divided_kernels.h"

namespace vidattn {
namespace {

const DividedKernels& kernels(const DividedArgs& a) {
  return kernels_for<DividedKernels>(a.element, VIDATTN_KERNELS(divided));
}

DividedArgs read_call(Arguments& from, Slot context) {
  const Tensor* seed;
  DividedArgs a = read_divided_call(from, context, seed);
  set_seed(a, seed);
  return a;
}

// Runs one pass for the heads that attend over time, then for those that attend over space.
void run_axes(DividedArgs& a, bool backward) {
  const DividedKernels& cpu = kernels(a);
  for (bool over_time : {true, false}) {
    if (!set_axis(a, over_time)) continue;
    a.short_sequences = !a.cls && a.patches <= kShortSequence && a.element != Element::float64;
    a.tasks = a.batch * a.groups * (a.short_sequences ? 1 : a.num_heads);
    run(a, cpu, backward, a.tasks, backward ? cpu.backward : cpu.forward);
  }
  if (!backward && !a.cls_mean.data) return;
  if (backward && !a.cls) return;
  for (int64_t clip = 0; clip < a.batch; ++clip) cpu.add_frames(a, backward, clip);
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  DividedArgs a = read_call(from, kOut);
  const Tensor *cls = from.maybe_tensor(), *cls_mean = from.maybe_tensor(), *lse = from.maybe_tensor();
  STD_TORCH_CHECK((cls != nullptr) == (a.cls == 1), "expected room for the context of a cls token where there is one");
  STD_TORCH_CHECK(!lse, "the CPU's backward pass needs no log-sum-exp");
  if (cls) a.cls_out = cls->data_ptr();
  if (cls_mean) {
    const int64_t bytes = bytes_of(a.element);
    a.cls_mean = {static_cast<char*>(cls_mean->data_ptr()), {cls_mean->stride(0) * bytes, 0, a.head_dim * bytes}};
  }
  run_axes(a, false);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  DividedArgs a = read_call(from, kDout);
  const Tensor* dcls = from.maybe_tensor();
  STD_TORCH_CHECK((dcls != nullptr) == (a.cls == 1), "expected a gradient of the cls token where there is one");
  // out, cls and lse: here a query's scores are at hand all at once
  from.maybe_tensor(), from.maybe_tensor(), from.maybe_tensor();
  for (Slot slot : {kDq, kDk, kDv}) a.tensor[slot] = row_tensor(from.tensor(), a.head_dim, a.cls);
  std::unique_ptr<double[]> gradients;  // floats but for float64
  if (dcls) {
    STD_TORCH_CHECK(dcls->stride(-1) == 1 || dcls->size(-1) == 1, "the last dimension must be contiguous");
    a.dcls = dcls->data_ptr();
    a.dcls_stride[0] = dcls->stride(0), a.dcls_stride[1] = dcls->stride(1);
    const int64_t size = 3 * a.batch * a.frames * a.heads * a.head_dim;
    gradients.reset(new double[a.element == Element::float64 ? size : (size + 1) / 2]);
    a.cls_gradients = gradients.get();
  }
  run_axes(a, true);
}

}  // namespace
}  // namespace vidattn

STABLE_TORCH_LIBRARY_IMPL(vidattn, CPU, m) {
  m.impl("_divided_attention_forward", &vidattn::forward);
  m.impl("_divided_attention_backward", &vidattn::backward);
}
