// The native ops of the mixing family on CUDA: reads the tensors and starts the kernels.
#include <device.h>
#include "mixing_call.h"
#include "mixing_cuda.h"

namespace vidattn::cuda {
namespace {

void temporal_shift_op(Tensor x, int64_t num_frames, Ints shifts, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous() && out.is_contiguous() && x.numel() == out.numel(),
                  "expected contiguous tensors (frames, outer, channels, inner)");
  STD_TORCH_CHECK(num_frames >= 1 && x.size(0) % num_frames == 0, "expected whole segments of frames");
  STD_TORCH_CHECK(x.numel() > 0, "expected at least one element");
  const std::vector<ChannelShift> ranges = channel_shifts(shifts, x.size(2));
  const ShiftArgs a{static_cast<const char*>(x.data_ptr()),
                    static_cast<char*>(out.data_ptr()),
                    x.size(0),
                    num_frames,
                    x.size(1),
                    x.size(2),
                    x.size(3) * static_cast<int64_t>(x.element_size()),
                    ranges.data(),
                    static_cast<int64_t>(ranges.size())};
  const OnDeviceOf device(out);
  const char* error = temporal_shift(a, device.stream());
  STD_TORCH_CHECK(!error, "starting the kernel of temporal shift failed: ", error ? error : "");
}

}  // namespace
}  // namespace vidattn::cuda

#define VIDATTN_REGISTER(...) STABLE_TORCH_LIBRARY_IMPL(__VA_ARGS__)
VIDATTN_REGISTER(VIDATTN_CUDA_LIBRARY, m) {
  m.impl("_temporal_shift", TORCH_BOX(&vidattn::cuda::temporal_shift_op));
}
