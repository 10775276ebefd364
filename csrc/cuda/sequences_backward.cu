// The backward pass of sequences on CUDA: which kernel runs a call, and how.
#include "sequence_backward.cuh"
#include "sequences_host.h"

namespace vidattn::cuda {
namespace {

// A sequence a block, for what has no room for two.
template <class T, int kDim>
__global__ void __launch_bounds__(32 * most_warps(kDim), 1)
    sequence_backward(const __grid_constant__ SequenceArguments arguments) {
  attention_backward_of_group<T, kDim, SequenceGradientGroup, 32, 32>(arguments);
}

SequenceBackwardKernel kernel_for(Element element, const BackwardPlan& plan) {
  if (plan.walks) return walking_sequence_kernel(element, plan);
  return element == Element::float16 ? sequence_backward<__half, 64> : sequence_backward<__nv_bfloat16, 64>;
}

}  // namespace

int64_t sequences_backward_floats(int64_t keys, int64_t head_dim, int64_t tasks) {
  const BackwardPlan plan = plan_sequence_backward(keys, head_dim, gpu::shared_memory_limit());
  return plan.blocks > 1 ? tasks * round_up(keys, 32) * plan.dim : 0;
}

const char* launch_sequences_backward(SequenceArguments a, int64_t groups, Element element, float* dq_sums,
                                      void* stream) {
  const int limit = gpu::shared_memory_limit();
  a.backward = plan_sequence_backward(a.keys, a.head_dim, limit);
  const BackwardPlan& plan = a.backward;
  if (plan.shared_bytes > limit) return "a block has too little shared memory";
  a.slots = int(round_up(a.keys, 32)), a.bases = plan.tokens, a.dq_sums = dq_sums;
  a.whole_rows = a.keys <= kWholeRowTokens && plan.blocks == 1;
  a.tasks = int(groups * a.heads.divisor());
  int64_t blocks = a.tasks;
  if (plan.walks) {
    const int64_t together = gpu::multiprocessors() * walking_blocks(plan, limit);
    if (together > 0 && together < blocks) blocks = together;
  }
  return gpu::launch(kernel_for(element, plan), dim3(uint32_t(blocks)), dim3(uint32_t(plan.threads)),
                     size_t(plan.shared_bytes), stream, a);
}

}  // namespace vidattn::cuda
