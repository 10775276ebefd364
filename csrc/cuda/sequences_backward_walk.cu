// The backward pass of sequences on CUDA: the kernel whose blocks walk over them.
#include "sequence_backward.cuh"
#include "sequences_host.h"

namespace vidattn::cuda {
namespace {

template <class T, int kDim>
__global__ void __launch_bounds__(32 * most_warps(kDim), 1)
    walking_sequence_backward(const __grid_constant__ SequenceArguments arguments) {
  walk_over_sequences<T, kDim>(arguments);
}

template <class T>
SequenceBackwardKernel kernel_for(const BackwardPlan& plan) {
  return plan.dim == 32 ? walking_sequence_backward<T, 32> : walking_sequence_backward<T, 64>;
}

}  // namespace

SequenceBackwardKernel walking_sequence_kernel(Element element, const BackwardPlan& plan) {
  return element == Element::float16 ? kernel_for<__half>(plan) : kernel_for<__nv_bfloat16>(plan);
}

}  // namespace vidattn::cuda
