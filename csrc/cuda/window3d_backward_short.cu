// The backward pass of short windows.
#include "short_window.cuh"
#include "window3d_cuda.h"
#include "window3d_gradient.cuh"

namespace vidattn::cuda {
namespace {

// 64 tokens: three blocks of four warps share a multiprocessor, with up to 168 registers a thread.
template <class T, int kTokens>
__global__ void __launch_bounds__(2 * kTokens, kTokens <= kWholeRowTokens ? 3 : 1)
    short_window_backward(const __grid_constant__ WindowGradientArguments arguments) {
  short_backward<T, 32, WindowGradientGroup<false>, kTokens>(arguments);
}

template <class T>
WindowBackwardKernel kernel_for(const BackwardPlan& plan) {
  return plan.query_tile == kWholeRowTokens ? short_window_backward<T, kWholeRowTokens>
                                            : short_window_backward<T, kShortWindow>;
}

}  // namespace

WindowBackwardKernel short_window_kernel(Element element, const BackwardPlan& plan) {
  return element == Element::float16 ? kernel_for<__half>(plan) : kernel_for<__nv_bfloat16>(plan);
}

}  // namespace vidattn::cuda
