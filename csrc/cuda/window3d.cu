// Shifted-window 3D attention on CUDA: which kernel runs a call, and how.
#include "window3d_cuda.h"

#include "forward.cuh"
#include "window3d.cuh"
#include "window3d_host.h"

namespace vidattn::cuda {
namespace {

// Of the registers of a multiprocessor, a thread may have its share of those of most_warps: 168 or 255.
template <class T, int kDim>
__global__ void __launch_bounds__(32 * most_warps(kDim))
    window_forward(const __grid_constant__ WindowArguments arguments) {
  attention_forward<T, kDim, WindowGroup<false>, 6>(arguments);
}

template <class T, int kDim>
__global__ void __launch_bounds__(32 * most_warps(kDim))
    depth_fastest_window_forward(const __grid_constant__ WindowArguments arguments) {
  attention_forward<T, kDim, WindowGroup<true>, 7>(arguments);
}

template <class T>
auto kernel_for(const ForwardPlan& plan) {
  if (plan.depth_fastest)
    return plan.dim == 32 ? depth_fastest_window_forward<T, 32> : depth_fastest_window_forward<T, 64>;
  return plan.dim == 32 ? window_forward<T, 32> : window_forward<T, 64>;
}

}  // namespace

const char* window3d_forward(const Window3dArgs& call, void* stream) {
  WindowArguments a{};
  describe_tokens(a, call, {kQ, kK, kV, kOut});
  const WindowShape shape = shape_of(a);
  const int limit = gpu::shared_memory_limit();
  a.plan = plan_forward(shape, limit);
  if (a.plan.shared_bytes > limit || a.plan.block_keys <= 0) return "a block has too little shared memory";
  a.numbers = a.plan.key_rows() * a.plan.dim * 4, a.bases = a.numbers + 16 + kShareBytes;
  place_tokens(a, round_up(call.tokens, 16), a.numbers + kBlockBytes, !a.plan.depth_fastest);
  const int64_t height = call.window[1], planes = call.window[0] / 8 - 1;
  a.odd_steps = a.plan.bias_floats / 2 * 4 - 4;
  a.first_site = int((planes * (2 * height - 1) + height - 1) * 13 + 6);
  a.splits = Divisor(a.plan.splits), a.warps = Divisor(a.plan.threads / 32);
  a.shares = Divisor(a.plan.splits * (a.plan.threads / 32));
  a.lines = Divisor(2 * call.window[1] - 1), a.columns = Divisor(2 * call.window[2] - 1);
  const int64_t* table = call.bias_window;
  if (call.bias_is_table)
    a.bias_row = int((table[0] - 1) * a.plan.pitch.plane + (table[1] - 1) * a.plan.pitch.row + table[2] - 1);
  a.hiding_room = 0.5f * (-kNothing / a.factor - a.mask_added), a.all_chunks = (1u << call.tokens / 56 % 32) - 1;
  a.folds = has_moderate_numbers(call) && a.plan.bias_floats > 0;
  const auto kernel = call.element == Element::float16 ? kernel_for<__half>(a.plan) : kernel_for<__nv_bfloat16>(a.plan);
  return gpu::launch(kernel, dim3(uint32_t(shape.blocks * a.plan.splits)), dim3(uint32_t(a.plan.threads)),
                     size_t(a.plan.shared_bytes), stream, a);
}

}  // namespace vidattn::cuda
