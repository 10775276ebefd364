// The native ops of the divided family on CUDA: reads the tensors and starts the kernels, along one axis after the
// other.
#include <device.h>
#include "divided_call.h"
#include "divided_cuda.h"
#include "divided_short.h"
#include "plan.h"

namespace vidattn::cuda {
namespace {

void check(const DividedArgs& a) {
  STD_TORCH_CHECK(a.element == Element::float16 || a.element == Element::bfloat16, "expected float16 or bfloat16");
  STD_TORCH_CHECK(a.head_dim <= kMaxHeadDim, "expected head_dim up to ", kMaxHeadDim, ", got ", a.head_dim);
  STD_TORCH_CHECK(a.dropout_p == 0, "dropout is not implemented");
  STD_TORCH_CHECK(!a.cls_sees_all, "a cls token whose query sees the whole clip is not implemented");
}

// Runs one pass for the heads that attend over time, then for those that attend over space.
template <class Short, class Long>
void run_axes(DividedArgs& a, Short run_short, Long run_long) {
  for (bool over_time : {true, false}) {
    if (!set_axis(a, over_time)) continue;
    STD_TORCH_CHECK(a.cls + a.patches <= kMaxSequence, "expected sequences of up to ", kMaxSequence, " tokens, got ",
                    a.cls + a.patches);
    STD_TORCH_CHECK(a.batch * a.groups * a.num_heads <= INT32_MAX, "more than 2^31 - 1 blocks");
    STD_TORCH_CHECK(is_short(a) || a.lse, "expected a log-sum-exp");
    const char* error = is_short(a) ? run_short() : run_long();
    STD_TORCH_CHECK(!error, "starting the kernel of divided attention failed: ", error ? error : "");
  }
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  const Tensor* seed;
  DividedArgs a = read_divided_call(from, kOut, seed);
  const Tensor *cls = from.maybe_tensor(), *cls_mean = from.maybe_tensor(), *lse = from.maybe_tensor();
  check(a);
  STD_TORCH_CHECK((cls != nullptr) == (a.cls == 1), "expected room for the context of a cls token where there is one");
  if (cls) a.cls_out = cls->data_ptr();
  if (cls_mean) a.cls_mean = {static_cast<char*>(cls_mean->data_ptr()), {2 * cls_mean->stride(0), 0, 2 * a.head_dim}};
  if (lse) a.lse = lse->data_ptr();
  const OnDeviceOf device(from.first());
  run_axes(
      a, [&] { return divided_short_forward(a, device.stream()); },
      [&] { return divided_forward(a, device.stream()); });
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  const Tensor* seed;
  DividedArgs a = read_divided_call(from, kDout, seed);
  const Tensor *dcls = from.maybe_tensor(), *out = from.maybe_tensor();
  const Tensor *cls = from.maybe_tensor(), *lse = from.maybe_tensor();
  read_rows(a, Tokens(from), kDq);
  check(a);
  STD_TORCH_CHECK((dcls != nullptr) == (a.cls == 1) && (cls != nullptr) == (a.cls == 1),
                  "expected a context of the cls token, and its gradient, where there is one");
  if (dcls) {
    STD_TORCH_CHECK(dcls->stride(-1) == 1 || dcls->size(-1) == 1, "the last dimension must be contiguous");
    a.dcls = dcls->data_ptr(), a.cls_out = cls->data_ptr();
    a.dcls_stride[0] = dcls->stride(0), a.dcls_stride[1] = dcls->stride(1);
  }
  if (out) a.tensor[kOut] = row_tensor(*out, a.head_dim);
  if (lse) a.lse = lse->data_ptr();
  OnDeviceOf device(from.first());
  run_axes(
      a, [&] { return divided_short_backward(a, device.stream()); },
      [&] { return divided_backward(a, device.new_floats(divided_backward_floats(a)), device.stream()); });
}

}  // namespace
}  // namespace vidattn::cuda

#define VIDATTN_REGISTER(...) STABLE_TORCH_LIBRARY_IMPL(__VA_ARGS__)
VIDATTN_REGISTER(VIDATTN_CUDA_LIBRARY, m) {
  m.impl("_divided_attention_forward", &vidattn::cuda::forward);
  m.impl("_divided_attention_backward", &vidattn::cuda::backward);
}
