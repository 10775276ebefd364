// How a forward pass uses the shared memory of a block: numbers in, numbers out.
#pragma once
#include <stdint.h>

#include "call.h"

namespace vidattn::cuda {

constexpr int64_t kMaxTokens = 1200, kMaxHeadDim = 64;

struct ForwardPlan {
  int dim;               // elements of a row in shared memory: head_dim, filled up with zeros
  int threads;           // of a block
  int block_keys;        // keys and values in shared memory at a time: all of them, or a multiple of 64
  bool resident;         // all of them
  bool bias_in_shared;   // the table of one head, divided by the scale
  int64_t shared_bytes;  // of a block
};

// Bytes that the description of a group's tokens takes: where their rows start (for each of the strides that differ),
// their number in the grid, the part of a bias row that depends on them, and their region.
constexpr int64_t token_bytes(int64_t tokens, int64_t stride_sets) {
  return round_up(tokens, 16) * (8 * stride_sets + 4 + 4 + 2);
}

// What fits is kept: first the keys and values, then the bias; blocks of keys are as large as can be.
constexpr ForwardPlan plan_forward(int64_t tokens, int64_t head_dim, int64_t bias_floats, int64_t stride_sets,
                                   int64_t limit) {
  ForwardPlan plan{};
  plan.dim = head_dim <= 32 ? 32 : 64;
  const int64_t warps = ceil_div(tokens, 16);
  plan.threads = static_cast<int>(32 * (warps < 8 ? warps : ceil_div(warps, ceil_div(warps, 8))));
  const int64_t pair_bytes = 4 * plan.dim, bias_bytes = round_up(4 * bias_floats, 16);
  const int64_t left = limit - token_bytes(tokens, stride_sets);
  const int64_t all = round_up(tokens, 16);
  plan.resident = all * pair_bytes <= left;
  plan.block_keys = static_cast<int>(plan.resident ? all : 64);
  plan.bias_in_shared = bias_bytes > 0 && plan.block_keys * pair_bytes + bias_bytes <= left;
  if (!plan.resident)
    plan.block_keys = static_cast<int>((left - (plan.bias_in_shared ? bias_bytes : 0)) / pair_bytes / 64 * 64);
  plan.shared_bytes =
      plan.block_keys * pair_bytes + token_bytes(tokens, stride_sets) + (plan.bias_in_shared ? bias_bytes : 0);
  return plan;
}

}  // namespace vidattn::cuda
