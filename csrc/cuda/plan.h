// How a forward pass of windows uses a block of threads and its shared memory: numbers in, numbers out.
#pragma once
#include <stdint.h>

#include "call.h"

namespace vidattn::cuda {

constexpr int64_t kMaxTokens = 1200, kMaxHeadDim = 64;

struct WindowShape {
  int64_t window[3], head_dim;
  int64_t table_rows;   // of the bias; 0 without a table
  bool plain_bias;      // none, or a table that is indexed by the coordinates of this window
  int64_t stride_sets;  // how many strides q, k and v have: 1 or 3
};

struct ForwardPlan {
  int dim;               // elements of a row in shared memory: head_dim, filled up with zeros
  int threads;           // of a block
  int block_keys;        // keys and values in shared memory at a time
  bool resident;         // all of them
  bool depth_fastest;    // order of the tokens: see WindowGroup
  int bias_floats;       // of the bias in shared memory; 0 if it does not fit
  int64_t shared_bytes;  // of a block
};

// Bytes that describe the tokens of a group: where their rows start, for each set of strides; their number in the grid;
// the part of a bias row that depends on them; their region.
constexpr int64_t token_bytes(int64_t tokens, int64_t stride_sets) {
  return round_up(tokens, 16) * (8 * stride_sets + 4 + 4 + 2);
}

// Warps for so many tiles of queries, at most `most`, that all have about the same number of them.
constexpr int64_t even_warps(int64_t tiles, int64_t most) {
  return ceil_div(tiles, ceil_div(tiles, most));
}

// The bias as depth-fastest windows read it: two copies, 16 entries for each difference of depth / 8, height and width.
constexpr int64_t depth_fastest_floats(const WindowShape& s) {
  return 2 * (2 * (s.window[0] / 8) - 1) * (2 * s.window[1] - 1) * (2 * s.window[2] - 1) * 16;
}

// Keys and values come first; what is left is for the bias. `limit` is the shared memory that a block may have.
constexpr ForwardPlan plan_forward(const WindowShape& s, int64_t limit) {
  ForwardPlan plan{};
  const int64_t tokens = s.window[0] * s.window[1] * s.window[2], all = round_up(tokens, 16);
  plan.dim = s.head_dim <= 32 ? 32 : 64;
  const int64_t pair_bytes = 4 * plan.dim, left = limit - token_bytes(tokens, s.stride_sets);
  plan.resident = all * pair_bytes <= left;
  const bool eights = s.window[0] % 8 == 0 && s.window[2] == 7 && s.plain_bias;
  plan.depth_fastest = eights && plan.resident && all * pair_bytes + 4 * depth_fastest_floats(s) <= left;
  const int64_t rows = plan.depth_fastest && plan.dim == 32 ? 32 : 16;  // that a warp takes at a time
  plan.threads = static_cast<int>(32 * even_warps(ceil_div(tokens, rows), plan.depth_fastest ? 6 : 8));
  const int64_t floats = plan.depth_fastest ? depth_fastest_floats(s) : s.table_rows > 0 ? s.table_rows : 1;
  const int64_t bias_bytes = round_up(4 * floats, 16);
  const bool fits = (plan.resident ? all : 64) * pair_bytes + bias_bytes <= left;
  const int64_t bias = fits ? bias_bytes : 0;
  plan.bias_floats = static_cast<int>(fits ? floats : 0);
  plan.block_keys = static_cast<int>(plan.resident ? all : (left - bias) / pair_bytes / 64 * 64);
  plan.shared_bytes = plan.block_keys * pair_bytes + token_bytes(tokens, s.stride_sets) + bias;
  return plan;
}

}  // namespace vidattn::cuda
