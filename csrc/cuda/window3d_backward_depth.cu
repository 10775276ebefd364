// The backward pass of windows that are 8 deep and 7 wide, or have such axes: their tokens lie depth fastest.
#include "depth_fastest.cuh"
#include "window3d_cuda.h"

namespace vidattn::cuda {
namespace {

template <class T, int kDim>
__global__ void __launch_bounds__(32 * kPlaces, 1)
    depth_fastest_window_backward(const __grid_constant__ WindowGradientArguments arguments) {
  static_assert(kDim == 32);
  depth_fastest_backward<T>(arguments);
}

}  // namespace

WindowBackwardKernel depth_fastest_kernel(Element element) {
  return element == Element::float16 ? depth_fastest_window_backward<__half, 32>
                                     : depth_fastest_window_backward<__nv_bfloat16, 32>;
}

}  // namespace vidattn::cuda
