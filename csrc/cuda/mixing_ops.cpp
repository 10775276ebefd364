// The native ops of the mixing family on CUDA: reads the tensors and starts the kernels.
#include <device.h>
#include "mixing_call.h"
#include "mixing_cuda.h"
#include "plan.h"

namespace vidattn::cuda {
namespace {

// ---- Attention ----

void check(const MixingArgs& a) {
  STD_TORCH_CHECK(a.element == Element::float16 || a.element == Element::bfloat16, "expected float16 or bfloat16");
  STD_TORCH_CHECK(a.head_dim <= kMaxHeadDim && a.tokens <= kMaxSequence, "expected head_dim up to ", kMaxHeadDim,
                  " and frames of up to ", kMaxSequence, " tokens, got ", a.head_dim, " and ", a.tokens);
  STD_TORCH_CHECK(a.num_shifts <= kMaxRanges, "expected up to ", kMaxRanges, " ranges of channels, got ", a.num_shifts);
  STD_TORCH_CHECK(a.dropout_p == 0, "dropout is not implemented");
  STD_TORCH_CHECK(a.frames * a.heads <= INT32_MAX, "more than 2^31 - 1 blocks");
  STD_TORCH_CHECK(a.lse, "expected a log-sum-exp");
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  const Tensor* seed;
  std::vector<ChannelShift> shifts;
  MixingArgs a = read_mixing_call(from, shifts, seed);
  const Tensor& out = from.tensor();
  a.tensor[kOut] = row_tensor(out, a.head_dim);
  if (const Tensor* lse = from.maybe_tensor()) a.lse = lse->data_ptr();
  check(a);
  const OnDeviceOf device(out);
  const char* error = mixing_forward(a, device.stream());
  STD_TORCH_CHECK(!error, "starting the kernel of mixing attention failed: ", error ? error : "");
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  const Tensor* seed;
  std::vector<ChannelShift> shifts;
  MixingArgs a = read_mixing_call(from, shifts, seed);
  const Tensor& dout = from.tensor();
  a.tensor[kDout] = row_tensor(dout, a.head_dim);
  const Tensor *out = from.maybe_tensor(), *lse = from.maybe_tensor();
  STD_TORCH_CHECK(out && lse, "expected the context and log-sum-exp of the forward pass");
  a.tensor[kOut] = row_tensor(*out, a.head_dim);
  a.lse = lse->data_ptr();
  read_rows(a, Tokens(from), kDq);
  check(a);
  OnDeviceOf device(dout);
  const char* error = mixing_backward(a, device.new_floats(mixing_backward_floats(a)), device.stream());
  STD_TORCH_CHECK(!error, "starting the kernel of mixing attention failed: ", error ? error : "");
}

// ---- Shift ----

void temporal_shift_op(Tensor x, int64_t num_frames, Ints shifts, int64_t dim, Tensor out) {
  const ShiftCall call = read_shift_call(x, num_frames, shifts, dim, out);
  STD_TORCH_CHECK(x.numel() > 0, "expected at least one element");
  const ShiftArgs a{static_cast<const char*>(x.data_ptr()),
                    static_cast<char*>(out.data_ptr()),
                    call.frames,
                    num_frames,
                    call.outer,
                    call.channels,
                    call.channel_bytes,
                    call.shifts.data(),
                    static_cast<int64_t>(call.shifts.size())};
  const OnDeviceOf device(out);
  const char* error = temporal_shift(a, device.stream());
  STD_TORCH_CHECK(!error, "starting the kernel of temporal shift failed: ", error ? error : "");
}

}  // namespace
}  // namespace vidattn::cuda

#define VIDATTN_REGISTER(...) STABLE_TORCH_LIBRARY_IMPL(__VA_ARGS__)
VIDATTN_REGISTER(VIDATTN_CUDA_LIBRARY, m) {
  m.impl("_space_time_mixing_attention_forward", &vidattn::cuda::forward);
  m.impl("_space_time_mixing_attention_backward", &vidattn::cuda::backward);
  m.impl("_temporal_shift", TORCH_BOX(&vidattn::cuda::temporal_shift_op));
}
