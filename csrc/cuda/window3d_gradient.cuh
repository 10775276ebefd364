// The windows of a token grid as groups of the backward pass: where a token's rows lie, what is added to a score.
#pragma once
#include "divisor.cuh"
#include "plan.h"
#include "rows.cuh"
#include "window3d_args.h"

namespace vidattn::cuda {

struct WindowGradientArguments {
  Window3dArgs call;
  BackwardPlan backward;
  // What numbers of blocks, tokens and rows of the table are divided by.
  Divisor heads, count[3], height, width, bias_height, bias_width, table_heights, table_widths;
  int unit, query_unit, dout_unit, gradient_unit;  // bytes that all rows of k and v, of q, of dout and out, or of dq,
                                                   // dk and dv, are a multiple of
  int tables, slots;             // where the tables of the tokens start in shared memory, and how many each is for
  int stride_sets;               // different strides among the tensors
  int set_of[kSlots];            // which of them a tensor has; negative: the last one of its grid counts through all
  Slot slot_of[kSlots];          // a tensor that has them
  float factor;                  // scale * log2 e
  float bias_scale, mask_added;  // 1 / scale, mask_value / scale
  bool folds;                    // whether the numbers known to the host allow it
  bool whole_rows;               // whether statistics of rows come from all their scores, not from the forward pass
  bool pad_gradient;
  // The axes of the call come as BackwardPlan::axes says. The numbers of tokens in the grid and of rows of the table do
  // not change by that: steps along the axes, and the row of a token with itself.
  int token_step[3], table_step[3], middle_row;
  int token_stride[kSlots];         // bytes from token to token, for a tensor that has no set of strides
  int64_t shares;                   // of the windows of a head, a block each
  int share_groups, longer_shares;  // windows of a share; so many of the first ones have one more
  float* dq_sums;                   // for each block a window's dq; null if keys come in one block
  float* table_sums;   // for each block its warps' sums of the table's gradient, where they are not in shared memory
  float* table_parts;  // (shares, heads, table rows), or null
  float* pad_parts;    // (shares, 3, heads, head_dim), or null

  __device__ __forceinline__ float* block_tables() const {
    return table_sums + int64_t(blockIdx.x) * backward.warps * backward.table_floats;
  }
};

using WindowBackwardKernel = void (*)(const WindowGradientArguments);
WindowBackwardKernel depth_fastest_kernel(Element element);                           // window3d_backward_depth.cu
WindowBackwardKernel short_window_kernel(Element element, const BackwardPlan& plan);  // window3d_backward_short.cu

// The windows of a token grid as groups of the backward pass. The order of their tokens is that of WindowGroup, and
// there are the same two (window3d.cuh); the bias lies in shared memory as its table does, or as RowBias says.
template <bool kDepthFastest>
class WindowGradientGroup {
 public:
  using Arguments = WindowGradientArguments;

  __device__ WindowGradientGroup(const Arguments& arguments, int head, int group)
      : a_(arguments.call), arguments_(arguments), head_(head), group_(group), border_(0) {
    int rest = group_;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const bool last = arguments.count[axis].split(rest) == int(a_.count[axis]) - 1;
      if (a_.region_mask[axis] && last) border_ |= 1 << axis;
    }
    batch_ = rest;
  }

  // Fills the tables of the tokens; to be followed by a barrier.
  __device__ void find_rows() {
    int start[3], rest = group_;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) start[axis] = arguments_.count[axis].split(rest) * int(a_.window[axis]);
    for (int slot = threadIdx.x; slot < kSlots; slot += blockDim.x) {
      const TokenTensor& x = a_.tensor[slot];
      bases()[slot] = batch_ * x.stride[0] + head_ * x.stride[4];
    }
    for (int n = threadIdx.x; n < slots(); n += blockDim.x) {
      int place[3] = {kDepthFastest ? n / 8 : n, 0, 0};
      place[2] = arguments_.width.split(place[0]), place[1] = arguments_.height.split(place[0]);
      if (kDepthFastest) place[0] = place[0] * 8 + n % 8;
      const bool is_key = this->is_key(n);
      bool real = is_key;
      int source[3], region = 0, token = 0;
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        const int padded = int(a_.count[axis]) * int(a_.window[axis]), grid = int(a_.grid[axis]);
        const int shifted = place[axis] + int(a_.shift[axis]);
        source[axis] = start[axis] + shifted;
        if (source[axis] >= padded) source[axis] -= padded;
        real &= source[axis] < grid;
        token += source[axis] * arguments_.token_step[axis];
        region |= int(shifted >= int(a_.window[axis])) << axis;
      }
      tokens()[n] = real ? token : -1;
      regions()[n] = uint16_t(region & border_);
      for (int set = 0; set < arguments_.stride_sets; ++set) {
        const int64_t* stride = a_.tensor[arguments_.slot_of[set]].stride;
        offsets()[set * slots() + n] = real ? batch_ * stride[0] + source[0] * stride[1] + source[1] * stride[2] +
                                                  source[2] * stride[3] + head_ * stride[4]
                                            : -1;
      }
      // The number that unravels to the coordinates of the bias; behind the last key, any that the table has.
      if (!kDepthFastest) {
        place[0] = (place[0] * int(a_.window[1]) + place[1]) * int(a_.window[2]) + place[2];
        place[2] = arguments_.bias_width.split(place[0]), place[1] = arguments_.bias_height.split(place[0]);
      }
      bias_rows()[n] = a_.bias_is_table && is_key ? 4 * table_row(place[0], place[1], place[2]) : 0;
    }
  }

  // Brings the bias to shared memory, as it is to be added. Returns whether this thread met moderate numbers only.
  __device__ bool load_bias() {
    if (!arguments_.folds) return false;
    if (!a_.bias_is_table) {
      for (int i = threadIdx.x; i < bias_entries(); i += blockDim.x) bias()[i] = 0.0f;
      return true;
    }
    bool moderate = true;
    for (int row = threadIdx.x; row < int(a_.bias_size); row += blockDim.x) {
      const float value = bias_of(row);
      moderate &= is_moderate(value);
      bias()[row] = value;
    }
    return moderate;
  }

  // Shows each difference of coordinates that the table has, query minus key, to visit(row, depth, height, width), each
  // to one thread.
  template <class Visit>
  __device__ __forceinline__ void for_each_difference(Visit visit) const {
    for (int i = threadIdx.x; i < table_rows(); i += blockDim.x) {
      int depth = i;
      const int width = arguments_.table_widths.split(depth), height = arguments_.table_heights.split(depth);
      visit(table_row(depth, height, width), depth - int(a_.bias_window[0]) + 1, height - int(a_.bias_window[1]) + 1,
            width - int(a_.bias_window[2]) + 1);
    }
  }
  // The same with the bias as it is to be added. Returns whether this thread met moderate numbers only.
  template <class Visit>
  __device__ __forceinline__ bool for_each_bias(Visit visit) const {
    bool moderate = true;
    if (a_.bias_is_table)
      for_each_difference([&](int row, int depth, int height, int width) {
        const float value = bias_of(row);
        moderate &= is_moderate(value);
        visit(depth, height, width, value);
      });
    return moderate;
  }

  // Those that only fill up an eight included.
  __device__ __forceinline__ int keys() const {
    return kDepthFastest ? arguments_.backward.block_keys : int(a_.tokens);
  }
  __device__ __forceinline__ bool is_key(int n) const {
    return n < keys() && (!kDepthFastest || n % 8 < int(a_.window[0]));
  }
  __device__ __forceinline__ int head_dim() const { return int(a_.head_dim); }
  __device__ __forceinline__ int unit() const { return arguments_.unit; }
  __device__ __forceinline__ int query_unit() const { return arguments_.query_unit; }
  __device__ __forceinline__ float factor() const { return arguments_.factor; }
  __device__ __forceinline__ bool masks() const { return border_ != 0; }
  __device__ __forceinline__ const char* readable() const { return a_.tensor[kK].data; }
  __device__ __forceinline__ const char* key(int n) const { return row(kK, n); }
  __device__ __forceinline__ const char* value(int n) const { return row(kV, n); }
  // A padding query has no output, so nobody needs it.
  __device__ __forceinline__ const char* query(int n) const {
    return n < keys() && tokens()[n] >= 0 ? row(kQ, n) : nullptr;
  }

  // The score of a query and key n: all that is added, step by step.
  __device__ __forceinline__ float exact(float product, int row, int n) const {
    if (kDepthFastest && !is_key(n)) return __int_as_float(0xff800000);  // -inf: it has no weight
    row = min(row, keys() - 1);
    float score = product * float(a_.scale);
    if (a_.bias_is_table)
      score += table()[((bias_rows()[row] - bias_rows()[n]) / 4 + centre()) * a_.bias_row_stride];
    else if (a_.bias)
      score += static_cast<const float*>(a_.bias)[(int64_t(head_) * a_.tokens + row) * a_.tokens + n];
    if (a_.mask)
      score +=
          static_cast<const float*>(a_.mask)[(int64_t(group_ % int(a_.mask_groups)) * a_.tokens + row) * a_.tokens + n];
    if (border_ && regions()[n] != regions()[row]) score += float(a_.mask_value);
    return score;
  }

  __device__ __forceinline__ const Arguments& gradients() const { return arguments_; }
  __device__ __forceinline__ bool is_real(int n) const { return n < keys() && tokens()[n] >= 0; }
  __device__ __forceinline__ const char* dout(int n) const { return is_real(n) ? row(kDout, n) : nullptr; }
  __device__ __forceinline__ int dout_unit() const { return arguments_.dout_unit; }
  __device__ __forceinline__ const char* readable_query() const { return a_.tensor[kQ].data; }
  __device__ __forceinline__ const char* readable_dout() const { return a_.tensor[kDout].data; }
  // Where a gradient goes; null for padding.
  __device__ __forceinline__ char* gradient(Slot slot, int n) const {
    return is_real(n) ? const_cast<char*>(row(slot, n)) : nullptr;
  }
  __device__ __forceinline__ float scale() const { return float(a_.scale); }

  // Where the address of a key's bias starts from.
  __device__ __forceinline__ uint32_t key_bias(int n) const {
    return gpu::shared_address(bias()) + 4 * centre() - bias_rows()[min(n, keys() - 1)];
  }
  // What is added to the product of a key and a query, divided by the scale.
  __device__ __forceinline__ float bias_at(uint32_t key, int query) const {
    return gpu::load_shared<float>(key + query);
  }
  __device__ __forceinline__ float mask_of(int key, int region) const {
    return regions()[min(key, keys() - 1)] != region ? arguments_.mask_added : 0.0f;
  }
  __device__ __forceinline__ int region(int n) const { return regions()[n]; }

  // Bias rows times 4 from that of a token with itself on, and the number of the latter.
  __device__ __forceinline__ int bias_offset(int n) const { return bias_rows()[n]; }
  __device__ __forceinline__ const int* bias_offsets(int n) const { return bias_rows() + n; }
  __device__ __forceinline__ int middle_row() const { return centre(); }
  __device__ __forceinline__ int table_rows() const { return int(a_.bias_size); }
  __device__ __forceinline__ int head() const { return head_; }
  __device__ __forceinline__ float mask_added() const { return arguments_.mask_added; }

  __device__ __forceinline__ float* bias() const { return reinterpret_cast<float*>(regions() + slots()); }

  // Number of a query among all tokens; negative for padding and behind the last one.
  __device__ __forceinline__ int64_t output_row(int n) const {
    return n < keys() && tokens()[n] >= 0 ? int64_t(batch_) * (a_.grid[0] * a_.grid[1] * a_.grid[2]) + tokens()[n] : -1;
  }
  __device__ __forceinline__ uint16_t* output(int64_t token) const {
    return reinterpret_cast<uint16_t*>(a_.tensor[kOut].data) + (token * a_.heads + head_) * a_.head_dim;
  }
  __device__ __forceinline__ float* lse(int64_t token) const {
    return static_cast<float*>(a_.lse) + token * a_.heads + head_;
  }

 private:
  __device__ __forceinline__ int table_row(int x, int y, int z) const {
    return x * arguments_.table_step[0] + y * arguments_.table_step[1] + z * arguments_.table_step[2];
  }
  // The row of a token with itself.
  __device__ __forceinline__ int centre() const { return arguments_.middle_row; }
  __device__ __forceinline__ int bias_entries() const { return arguments_.backward.bias_floats; }
  __device__ __forceinline__ float bias_of(int row) const {
    return table()[row * a_.bias_row_stride] * arguments_.bias_scale;
  }
  static __device__ __forceinline__ bool is_moderate(float x) { return fabsf(x) <= 1048576.0f; }  // 2^20
  __device__ __forceinline__ const float* table() const {
    return static_cast<const float*>(a_.bias) + head_ * a_.bias_head_stride;
  }
  // Where a token's row starts; null for zeros.
  __device__ __forceinline__ const char* row(int slot, int n) const {
    if (n >= keys()) return nullptr;
    const int set = arguments_.set_of[slot];
    if (set < 0) {
      const int token = tokens()[n];
      if (token >= 0) return a_.tensor[slot].data + (bases()[slot] + int64_t(token) * arguments_.token_stride[slot]);
    } else {
      const int64_t offset = offsets()[set * slots() + n];
      if (offset >= 0) return a_.tensor[slot].data + offset;
    }
    return a_.pad_qkv && is_key(n) ? a_.pad_qkv + (slot * a_.heads + head_) * a_.head_dim * 2 : nullptr;
  }

  // Where this head of each tensor starts in the batch element: bytes, as an address from shared memory might be any.
  __device__ __forceinline__ int64_t* bases() const {
    return reinterpret_cast<int64_t*>(gpu::shared_memory<unsigned char>() + kBasesPlace);
  }
  // The tables in shared memory, one behind the other, for `slots` tokens: the last ones are no keys.
  __device__ __forceinline__ int slots() const { return arguments_.slots; }
  __device__ __forceinline__ int64_t* offsets() const {
    return reinterpret_cast<int64_t*>(gpu::shared_memory<unsigned char>() + arguments_.tables);
  }
  __device__ __forceinline__ int* tokens() const {
    return reinterpret_cast<int*>(offsets() + arguments_.stride_sets * slots());
  }
  __device__ __forceinline__ int* bias_rows() const { return tokens() + slots(); }
  __device__ __forceinline__ uint16_t* regions() const { return reinterpret_cast<uint16_t*>(bias_rows() + slots()); }

  const Window3dArgs& a_;
  const Arguments& arguments_;
  int head_, group_, batch_;
  int border_;  // bit per axis: the last window of an axis that is shifted and not cyclic
};

}  // namespace vidattn::cuda
