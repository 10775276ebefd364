// The native ops of attention over time and over space: reads the tensors, cuts them into sequences along one axis
// after the other, and spreads those over threads.
#include <memory>

#include "dispatch.h"
#include "divided_call.h"
#include "divided_kernels.h"

namespace vidattn {
namespace {

const DividedKernels& kernels(const DividedArgs& a, bool backward) {
  return kernels_for<DividedKernels>(a.element, backward, VIDATTN_KERNELS(divided));
}

DividedArgs read_call(Arguments& from, Slot context) {
  const Tensor* seed;
  DividedArgs a = read_divided_call(from, context, seed);
  set_seed(a, seed);
  if (a.cls) set_axis(a, a.temporal_heads > 0);
  return a;
}

using Numbers = std::unique_ptr<double[]>;  // floats but for float64
Numbers new_numbers(const DividedArgs& a, int64_t count) {
  return Numbers(new double[a.element == Element::float64 ? count : ceil_div(count, 2)]);
}
// What the groups of a clip have for its cls token.
int64_t size_of_shares(const DividedArgs& a) {
  return a.batch * a.groups * a.heads * a.head_dim;
}

void run_part(const DividedArgs& a, DividedKernels::Part part, bool backward, int64_t tasks, int64_t grain) {
  parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { part(a, backward, begin, end); });
}

// Runs one pass for the heads that attend over time, then for those that attend over space.
void run_axes(DividedArgs& a, bool backward) {
  const DividedKernels& cpu = kernels(a, backward);
  Numbers weights;
  if (a.cls_sees_all) {
    weights = new_numbers(a, 2 * a.batch * a.heads * a.cls_stride());
    a.cls_weights = weights.get();
    run_part(a, cpu.cls_scores, backward, a.batch * a.rows(), 64);
    run_part(a, cpu.cls_softmax, backward, a.batch * a.heads, 1);
  }
  for (bool over_time : {true, false}) {
    if (!set_axis(a, over_time)) continue;
    const bool cls_asks = a.cls && !a.cls_sees_all;
    a.short_sequences = !cls_asks && a.patches <= kShortSequence && a.element != Element::float64;
    a.tasks = a.batch * a.groups * (a.short_sequences ? 1 : a.num_heads);
    run(a, cpu, backward, a.tasks);
  }
  if (!a.cls || (!backward && !a.cls_sees_all && !a.cls_mean.data)) return;
  const int64_t grain = ceil_div(32768, a.groups * a.head_dim);  // heads that are worth a thread
  run_part(a, cpu.add_groups, backward, a.batch * a.heads, grain);
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  DividedArgs a = read_call(from, kOut);
  const Tensor *cls = from.maybe_tensor(), *cls_mean = from.maybe_tensor(), *lse = from.maybe_tensor();
  STD_TORCH_CHECK((cls != nullptr) == (a.cls && !a.cls_sees_all),
                  "expected room for the contexts of a cls token that attends to each frame");
  STD_TORCH_CHECK(!lse, "the CPU's backward pass needs no log-sum-exp");
  if (cls) a.cls_out = cls->data_ptr();
  Numbers shares;
  if (a.cls_sees_all) {
    shares = new_numbers(a, size_of_shares(a));
    a.cls_out = shares.get();
  }
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
  STD_TORCH_CHECK((dcls != nullptr) == (a.cls && !a.cls_sees_all),
                  "expected a gradient of a cls token that attends to each frame");
  // out, cls and lse: here a query's scores are at hand all at once
  from.maybe_tensor(), from.maybe_tensor(), from.maybe_tensor();
  read_rows(a, Tokens(from), kDq);
  Numbers shares;
  if (a.cls) {
    shares = new_numbers(a, 3 * size_of_shares(a));
    a.cls_gradients = shares.get();
  }
  if (dcls) {
    STD_TORCH_CHECK(dcls->stride(-1) == 1 || dcls->size(-1) == 1, "the last dimension must be contiguous");
    a.dcls = dcls->data_ptr();
    a.dcls_stride[0] = dcls->stride(0), a.dcls_stride[1] = dcls->stride(1);
  }
  run_axes(a, true);
}

}  // namespace
}  // namespace vidattn

STABLE_TORCH_LIBRARY_IMPL(vidattn, CPU, m) {
  m.impl("_divided_attention_forward", &vidattn::forward);
  m.impl("_divided_attention_backward", &vidattn::backward);
}
