// The native ops of the divided family on CUDA: reads the tensors and starts the kernels.
#include <device.h>
#include "divided_call.h"
#include "divided_short.h"

namespace vidattn::cuda {
namespace {

// Runs one pass for the heads that attend over time, then for those that attend over space.
void run_axes(DividedArgs& a, const OnDeviceOf& device, const char* (*start)(const DividedArgs&, void*)) {
  STD_TORCH_CHECK(a.element == Element::float16 || a.element == Element::bfloat16, "expected float16 or bfloat16");
  STD_TORCH_CHECK(a.head_dim <= 64, "expected head_dim up to 64, got ", a.head_dim);
  STD_TORCH_CHECK(a.dropout_p == 0, "dropout is not implemented");
  for (bool over_time : {true, false}) {
    if (!set_axis(a, over_time)) continue;
    STD_TORCH_CHECK(is_short(a), "expected sequences of up to ", kShortLength, " rows without a cls token");
    const char* error = start(a, device.stream());
    STD_TORCH_CHECK(!error, "starting the kernel of short sequences failed: ", error ? error : "");
  }
}

void divided_forward_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  const Tensor* seed;
  DividedArgs a = read_divided_call(from, kOut, seed);
  const Tensor *cls = from.maybe_tensor(), *cls_mean = from.maybe_tensor(), *lse = from.maybe_tensor();
  STD_TORCH_CHECK(!cls && !cls_mean, "a cls token is not implemented");
  if (lse) a.lse = lse->data_ptr();
  run_axes(a, OnDeviceOf(from.first()), divided_short_forward);
}

void divided_backward_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  const Tensor* seed;
  DividedArgs a = read_divided_call(from, kDout, seed);
  for (int i = 0; i < 4; ++i) from.maybe_tensor();  // dcls, out, cls and lse: whole rows are at hand
  for (Slot slot : {kDq, kDk, kDv}) a.tensor[slot] = row_tensor(from.tensor(), a.head_dim);
  run_axes(a, OnDeviceOf(from.first()), divided_short_backward);
}

}  // namespace
}  // namespace vidattn::cuda

#define VIDATTN_REGISTER(...) STABLE_TORCH_LIBRARY_IMPL(__VA_ARGS__)
VIDATTN_REGISTER(VIDATTN_CUDA_LIBRARY, m) {
  m.impl("_divided_attention_forward", &vidattn::cuda::divided_forward_op);
  m.impl("_divided_attention_backward", &vidattn::cuda::divided_backward_op);
}
