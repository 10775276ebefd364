// The forward pass of sequences on CUDA: which kernel runs a call, and how.
#include "forward.cuh"
#include "sequences_host.h"

namespace vidattn::cuda {
namespace {

template <class T, int kDim>
__global__ void __launch_bounds__(32 * most_warps(kDim))
    sequence_forward(const __grid_constant__ SequenceArguments arguments) {
  attention_forward<T, SharedKeys<kDim, SequenceGroup, true>, 6>(arguments);
}

template <class T, int kDim>
__global__ void __launch_bounds__(32 * most_warps(kDim))
    streamed_sequence_forward(const __grid_constant__ SequenceArguments arguments) {
  attention_forward<T, SharedKeys<kDim, SequenceGroup, false>, 6>(arguments);
}

template <class T>
auto kernel_for(const ForwardPlan& plan) {
  if (!plan.resident) return plan.dim == 32 ? streamed_sequence_forward<T, 32> : streamed_sequence_forward<T, 64>;
  return plan.dim == 32 ? sequence_forward<T, 32> : sequence_forward<T, 64>;
}

}  // namespace

const char* launch_sequences_forward(SequenceArguments a, int64_t groups, Element element, void* stream) {
  const int limit = gpu::shared_memory_limit();
  const int64_t blocks = groups * a.heads.divisor();
  a.plan = plan_sequence_forward(a.keys, a.head_dim, blocks, limit);
  if (a.plan.shared_bytes > limit || a.plan.block_keys <= 0) return "a block has too little shared memory";
  a.bases = a.plan.key_rows() * a.plan.dim * 4;
  const int warps = a.plan.threads / 32;
  a.splits = Divisor(a.plan.splits), a.warps = Divisor(warps), a.shares = Divisor(a.plan.splits * warps);
  const auto kernel = element == Element::float16 ? kernel_for<__half>(a.plan) : kernel_for<__nv_bfloat16>(a.plan);
  return gpu::launch(kernel, dim3(uint32_t(blocks * a.plan.splits)), dim3(uint32_t(a.plan.threads)),
                     size_t(a.plan.shared_bytes), stream, a);
}

}  // namespace vidattn::cuda
