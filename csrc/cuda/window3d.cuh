// The windows of a token grid as groups of the attention kernels: where a token's rows lie, what is added to a score.
#pragma once
#include "plan.h"
#include "rows.cuh"
#include "window3d_args.h"

namespace vidattn::cuda {

struct WindowArguments {
  Window3dArgs call;
  ForwardPlan plan;
  int unit, query_unit;          // bytes that all rows of k and v, or of q, are a multiple of
  int stride_sets;               // 1 if q, k and v have the same strides, else 3
  float factor;                  // scale * log2 e
  float bias_scale, mask_added;  // 1 / scale, mask_value / scale
  bool folds;                    // whether the numbers known to the host allow it
};

class WindowGroup {
 public:
  using Arguments = WindowArguments;
  struct Query {
    int row;       // of the window
    int bias_row;  // the query's part of the bias row
    int region;
  };

  __device__ WindowGroup(const Arguments& arguments, unsigned char* shared)
      : a_(arguments.call), arguments_(arguments), head_(int(blockIdx.x % uint32_t(a_.heads))) {
    const int slots = (keys() + 15) / 16 * 16;
    offset_ = reinterpret_cast<int64_t*>(shared);
    token_ = reinterpret_cast<int*>(offset_ + slots * arguments.stride_sets);
    bias_row_ = token_ + slots;
    region_ = reinterpret_cast<uint16_t*>(bias_row_ + slots);
    bias_ = reinterpret_cast<float*>(region_ + slots);
    int64_t rest = group_ = blockIdx.x / uint32_t(a_.heads);
    border_ = 0;
    for (int axis = 2; axis >= 0; --axis) {
      at_[axis] = rest % a_.count[axis], rest /= a_.count[axis];
      if (a_.region_mask[axis] && at_[axis] == a_.count[axis] - 1) border_ |= 1 << axis;
    }
    batch_ = rest;
  }

  // Fills the tables of the tokens; to be followed by a barrier.
  __device__ void find_rows() {
    const int slots = (keys() + 15) / 16 * 16;
    for (int n = threadIdx.x; n < slots; n += blockDim.x) {
      const int wy = int(a_.window[1]), wz = int(a_.window[2]);
      const int place[3] = {n / wz / wy, n / wz % wy, n % wz};
      bool real = n < keys();
      int region = 0;
      int64_t source[3], token = 0;
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t padded = a_.count[axis] * a_.window[axis];
        source[axis] = at_[axis] * a_.window[axis] + place[axis] + a_.shift[axis];
        if (source[axis] >= padded) source[axis] -= padded;
        real &= source[axis] < a_.grid[axis];
        token = token * a_.grid[axis] + source[axis];
        region |= int(place[axis] + a_.shift[axis] >= a_.window[axis]) << axis;
      }
      token_[n] = real ? int(token) : -1;
      region_[n] = uint16_t(region & border_);
      for (int set = 0; set < arguments_.stride_sets; ++set) {
        const int64_t* stride = a_.tensor[set].stride;
        offset_[set * slots + n] = real ? batch_ * stride[0] + source[0] * stride[1] + source[1] * stride[2] +
                                              source[2] * stride[3] + head_ * stride[4]
                                        : -1;
      }
      if (a_.bias_is_table) {
        const int height = int(a_.bias_extent[0]), width = int(a_.bias_extent[1]);
        const int last = min(n, keys() - 1);  // behind the last key anything that the table has
        bias_row_[n] = table_row(last / width / height, last / width % height, last % width);
      } else {
        bias_row_[n] = 0;
      }
    }
  }

  // Brings the bias to shared memory, as it is to be added. Returns whether a thread met moderate numbers only.
  __device__ bool load_bias() {
    if (!arguments_.folds) return false;
    bool moderate = true;
    if (a_.bias_is_table)
      for (int i = threadIdx.x; i < int(a_.bias_size); i += blockDim.x) {
        const float value = table()[i * a_.bias_row_stride] * arguments_.bias_scale;
        moderate &= fabsf(value) <= 1048576.0f;  // 2^20
        bias_[i] = value;
      }
    return moderate;
  }

  __device__ __forceinline__ int keys() const { return int(a_.tokens); }
  __device__ __forceinline__ int head_dim() const { return int(a_.head_dim); }
  __device__ __forceinline__ int unit() const { return arguments_.unit; }
  __device__ __forceinline__ int query_unit() const { return arguments_.query_unit; }
  __device__ __forceinline__ float factor() const { return arguments_.factor; }
  __device__ __forceinline__ const char* readable() const { return a_.tensor[kK].data; }
  __device__ __forceinline__ const char* key(int n) const { return row(kK, n); }
  __device__ __forceinline__ const char* value(int n) const { return row(kV, n); }
  // A padding query has no output, so nobody needs it.
  __device__ __forceinline__ const char* query(int n) const {
    return n < keys() && token_[n] >= 0 ? row(kQ, n) : nullptr;
  }

  // Rows behind the last query repeat it.
  __device__ __forceinline__ Query describe(int n) const {
    n = min(n, keys() - 1);
    return {
        n, bias_row_[n] + table_row(int(a_.bias_window[0]) - 1, int(a_.bias_window[1]) - 1, int(a_.bias_window[2]) - 1),
        region_[n]};
  }

  // What is added to the products of two queries with keys n and n + 1, divided by the scale.
  __device__ __forceinline__ void folded(float (&added)[4], const Query (&query)[2], int n) const {
    if (a_.bias_is_table) {
      const int2 key = *reinterpret_cast<const int2*>(bias_row_ + n);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        added[2 * half] = bias_[query[half].bias_row - key.x];
        added[2 * half + 1] = bias_[query[half].bias_row - key.y];
      }
    }
    if (border_) {
      const uint32_t regions = *reinterpret_cast<const uint32_t*>(region_ + n);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (int(regions >> i % 2 * 16 & 15) != query[i / 2].region) added[i] += arguments_.mask_added;
    }
  }

  // The score of a query and key n: all that is added, step by step.
  __device__ __forceinline__ float exact(float product, const Query& query, int n) const {
    float score = product * float(a_.scale);
    if (a_.bias_is_table)
      score += table()[(query.bias_row - bias_row_[n]) * a_.bias_row_stride];
    else if (a_.bias)
      score += static_cast<const float*>(a_.bias)[(head_ * a_.tokens + query.row) * a_.tokens + n];
    if (a_.mask)
      score += static_cast<const float*>(a_.mask)[((group_ % a_.mask_groups) * a_.tokens + query.row) * a_.tokens + n];
    if (border_ && region_[n] != query.region) score += float(a_.mask_value);
    return score;
  }

  // Number of a query among all tokens; negative for padding and behind the last one.
  __device__ __forceinline__ int64_t output_row(int n) const {
    return n < keys() && token_[n] >= 0 ? batch_ * (a_.grid[0] * a_.grid[1] * a_.grid[2]) + token_[n] : -1;
  }
  template <class T>
  __device__ __forceinline__ T* output(int64_t token) const {
    return reinterpret_cast<T*>(a_.tensor[kOut].data) + (token * a_.heads + head_) * a_.head_dim;
  }
  __device__ __forceinline__ float* lse(int64_t token) const {
    return static_cast<float*>(a_.lse) + token * a_.heads + head_;
  }
  __device__ __forceinline__ bool pairs_aligned() const { return a_.head_dim % 2 == 0; }

 private:
  __device__ __forceinline__ int table_row(int x, int y, int z) const {
    return (x * (2 * int(a_.bias_window[1]) - 1) + y) * (2 * int(a_.bias_window[2]) - 1) + z;
  }
  __device__ __forceinline__ const float* table() const {
    return static_cast<const float*>(a_.bias) + head_ * a_.bias_head_stride;
  }
  // Where a token's row starts; null for zeros.
  __device__ __forceinline__ const char* row(int slot, int n) const {
    if (n >= keys()) return nullptr;
    const int64_t offset = offset_[(arguments_.stride_sets == 1 ? 0 : slot) * ((keys() + 15) / 16 * 16) + n];
    if (offset >= 0) return a_.tensor[slot].data + offset;
    return a_.pad_qkv ? a_.pad_qkv + (slot * a_.heads + head_) * a_.head_dim * 2 : nullptr;
  }

  const Window3dArgs& a_;
  const Arguments& arguments_;
  int head_, border_;
  int64_t group_, batch_, at_[3];
  int64_t* offset_;
  int *token_, *bias_row_;
  uint16_t* region_;
  float* bias_;
};

}  // namespace vidattn::cuda
