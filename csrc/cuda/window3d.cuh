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
  int tables, slots;             // where the tables of the tokens start in shared memory, and how many each is for
  int stride_sets;               // 1 if q, k and v have the same strides, else 3
  float factor;                  // scale * log2 e
  float bias_scale, mask_added;  // 1 / scale, mask_value / scale
  bool folds;                    // whether the numbers known to the host allow it
};

// The order of a window's tokens in shared memory. The kernels do not care, so there are two:
//   kDepthFastest = false  as in the grid, width fastest.
//   kDepthFastest = true   (depth / 8, height, width, depth % 8), for a depth that is a multiple of 8 and a width of 7.
//     Eight keys then are one place and eight depths, and so are eight queries: in a product of the two the differences
//     in height and width are the same for all lanes, and the difference in depth is always the same for one lane. So a
//     lane finds the bias of its two keys in two neighbouring entries of a table, at an address that moves by a
//     constant from place to place. 7 places make a chunk of keys.
template <bool kDepthFastest>
class WindowGroup {
 public:
  using Arguments = WindowArguments;
  static constexpr bool kWholeChunks = kDepthFastest;
  // Addresses are of the shared memory.
  struct Query {
    uint32_t bias;  // where the address of its bias starts from
  };
  struct Keys {     // a chunk of them
    uint32_t bias;  // width fastest: of four times the bias rows of this lane's first two keys; depth fastest: what is
                    // taken from the address of the bias
    uint32_t region;  // of those of this lane's first two keys
    int height;       // depth fastest: place of the chunk
  };
  // Two queries and a chunk of keys: where their bias lies, and the regions of the queries.
  struct Pairs {
    uint32_t bias[2];
    int region[2];
  };

  __device__ explicit WindowGroup(const Arguments& arguments)
      : a_(arguments.call),
        arguments_(arguments),
        head_(int(blockIdx.x % uint32_t(a_.heads))),
        group_(int(blockIdx.x / uint32_t(a_.heads))),
        border_(0) {
    int rest = group_;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const int count = int(a_.count[axis]);
      if (a_.region_mask[axis] && rest % count == count - 1) border_ |= 1 << axis;
      rest /= count;
    }
    batch_ = rest;
  }

  // Fills the tables of the tokens; to be followed by a barrier.
  __device__ void find_rows() {
    int64_t start[3];
    int rest = group_;
    for (int axis = 2; axis >= 0; --axis) {
      start[axis] = rest % int(a_.count[axis]) * a_.window[axis];
      rest /= int(a_.count[axis]);
    }
    for (int n = threadIdx.x; n < slots(); n += blockDim.x) {
      const int height = int(a_.window[1]), width = int(a_.window[2]);
      const int site = kDepthFastest ? n / 8 : n;
      const int place[3] = {site / width / height * (kDepthFastest ? 8 : 1) + (kDepthFastest ? n % 8 : 0),
                            site / width % height, site % width};
      bool real = n < keys();
      int region = 0;
      int64_t source[3], token = 0;
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t padded = a_.count[axis] * a_.window[axis];
        source[axis] = start[axis] + place[axis] + a_.shift[axis];
        if (source[axis] >= padded) source[axis] -= padded;
        real &= source[axis] < a_.grid[axis];
        token = token * a_.grid[axis] + source[axis];
        region |= int(place[axis] + a_.shift[axis] >= a_.window[axis]) << axis;
      }
      tokens()[n] = real ? int(token) : -1;
      regions()[n] = uint16_t(region & border_);
      for (int set = 0; set < arguments_.stride_sets; ++set) {
        const int64_t* stride = a_.tensor[set].stride;
        offsets()[set * slots() + n] = real ? batch_ * stride[0] + source[0] * stride[1] + source[1] * stride[2] +
                                                  source[2] * stride[3] + head_ * stride[4]
                                            : -1;
      }
      // The number that unravels to the coordinates of the bias; behind the last key, any that the table has.
      const int number = n < keys() ? (place[0] * height + place[1]) * width + place[2] : 0;
      bias_rows()[n] = a_.bias_is_table ? 4 * table_row(number / bias_width() / bias_height(),
                                                        number / bias_width() % bias_height(), number % bias_width())
                                        : 0;
    }
  }

  // Brings the bias to shared memory, as it is to be added. Returns whether this thread met moderate numbers only.
  __device__ bool load_bias() {
    if (!arguments_.folds) return false;
    if (!a_.bias_is_table) {
      for (int i = threadIdx.x; i < bias_entries(); i += blockDim.x) bias()[i] = 0.0f;
      return true;
    }
    // By rows of the table, which lie side by side for one head.
    const int columns = 2 * int(a_.bias_window[2]) - 1, sites = columns * (2 * int(a_.bias_window[1]) - 1);
    bool moderate = true;
    for (int row = threadIdx.x; row < int(a_.bias_size); row += blockDim.x) {
      const float value = table()[row * a_.bias_row_stride] * arguments_.bias_scale;
      moderate &= fabsf(value) <= 1048576.0f;  // 2^20
      if constexpr (kDepthFastest)
        store_pairs(value, row / sites - int(a_.bias_window[0]) + 1, row % sites / columns - int(a_.bias_window[1]) + 1,
                    row % columns - int(a_.bias_window[2]) + 1);
      else
        bias()[row] = value;
    }
    return moderate;
  }

  // Depth fastest: the bias of a difference of coordinates, query minus key, has its place at [difference of depth / 8]
  // [of height and width][of depth % 8], keys minus queries within the last. Pairs of neighbours are read as one, so
  // there is a second copy, in which the odd entries stand at even places. A table may be of a window larger than this
  // one.
  __device__ void store_pairs(float value, int depth, int height, int width) {
    const int rows = int(a_.window[1]), columns = int(a_.window[2]), eights = int(a_.window[0]) / 8;
    if (abs(height) >= rows || abs(width) >= columns) return;
    const int site = (height + rows - 1) * (2 * columns - 1) + width + columns - 1;
    for (int eight = 1 - eights; eight < eights; ++eight) {
      const int step = 7 - depth - 8 * eight;
      if (step < 0 || step > 14) continue;
      const int place = ((eight + eights - 1) * places() + site) * 16 + step;
      bias()[place] = value;
      bias()[bias_entries() / 2 + place + 1] = value;
    }
  }

  __device__ __forceinline__ int keys() const { return int(a_.tokens); }
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

  // Rows behind the last query repeat it.
  __device__ __forceinline__ Query describe(int n) const {
    n = min(n, keys() - 1);
    uint32_t address = gpu::shared_address(bias());
    if constexpr (kDepthFastest) {
      const int site = n / 8, width = int(a_.window[2]), height = int(a_.window[1]);
      const int difference = (site / width % height + height - 1) * (2 * width - 1) + site % width + width - 1;
      const int step = 7 - n % 8 + threadIdx.x % 4 * 2;
      address += ((int(a_.window[0]) / 8 - 1 - site / width / height) * places() + difference) * 64;
      address += step % 2 == 0 ? step * 4 : bias_entries() / 2 * 4 + (step + 1) * 4;
    } else {
      address += bias_rows()[n] + 4 * centre();
    }
    return {address};
  }

  // The chunk of keys from `key` on; depth-fastest windows start at 0. `column` is the first of this lane in 8 keys.
  __device__ __forceinline__ Keys first_keys(int key, int column) const {
    const uint32_t region = gpu::shared_address(regions() + key + column);
    return {kDepthFastest ? 0 : gpu::shared_address(bias_rows() + key + column), region, 0};
  }
  // The next chunk of `keys` keys.
  __device__ __forceinline__ void advance(Keys& at, int keys) const {
    at.region += 2 * keys;
    if constexpr (kDepthFastest) {
      const int row = 2 * int(a_.window[2]) - 1, height = int(a_.window[1]);
      at.bias += row * 64;
      if (++at.height == height) at.height = 0, at.bias -= (row * height + places()) * 64;
    } else {
      at.bias += 4 * keys;
    }
  }

  template <bool kMasked>
  __device__ __forceinline__ Pairs pairs(const Query (&query)[2], int row, const Keys& keys) const {
    Pairs pairs;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pairs.bias[half] = kDepthFastest ? gpu::keep(query[half].bias - keys.bias) : query[half].bias;
      pairs.region[half] = kMasked ? regions()[min(row + 8 * half, this->keys() - 1)] : 0;
    }
    return pairs;
  }

  // What is added to the products of two queries with two keys of tile n of a chunk, divided by the scale.
  template <bool kMasked>
  __device__ __forceinline__ void folded(float (&added)[4], const Pairs& pairs, const Keys& keys, int n) const {
    if constexpr (kDepthFastest) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 pair = gpu::load_shared<float2>(pairs.bias[half] - n * 64);
        added[2 * half] = pair.x, added[2 * half + 1] = pair.y;
      }
    } else {
      const int2 key = gpu::load_shared<int2>(keys.bias + 32 * n);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        added[2 * half] = gpu::load_shared<float>(pairs.bias[half] - key.x);
        added[2 * half + 1] = gpu::load_shared<float>(pairs.bias[half] - key.y);
      }
    }
    if (kMasked && border_) {
      const uint32_t regions = gpu::load_shared<uint32_t>(keys.region + 16 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (int(regions >> i % 2 * 16 & 15) != pairs.region[i / 2]) added[i] += arguments_.mask_added;
    }
  }

  // The score of a query and key n: all that is added, step by step.
  __device__ __forceinline__ float exact(float product, int row, int n) const {
    row = min(row, keys() - 1);
    float score = product * float(a_.scale);
    if (a_.bias_is_table)
      score += table()[((bias_rows()[row] - bias_rows()[n]) / 4 + centre()) * a_.bias_row_stride];
    else if (a_.bias)
      score += static_cast<const float*>(a_.bias)[(int64_t(head_) * a_.tokens + row) * a_.tokens + n];
    if (a_.mask)
      score += static_cast<const float*>(a_.mask)[((group_ % a_.mask_groups) * a_.tokens + row) * a_.tokens + n];
    if (border_ && regions()[n] != regions()[row]) score += float(a_.mask_value);
    return score;
  }

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
  __device__ __forceinline__ int bias_height() const { return int(a_.bias_extent[0]); }
  __device__ __forceinline__ int bias_width() const { return int(a_.bias_extent[1]); }
  __device__ __forceinline__ int table_row(int x, int y, int z) const {
    return (x * (2 * int(a_.bias_window[1]) - 1) + y) * (2 * int(a_.bias_window[2]) - 1) + z;
  }
  // The row of a token with itself.
  __device__ __forceinline__ int centre() const {
    return a_.bias_is_table
               ? table_row(int(a_.bias_window[0]) - 1, int(a_.bias_window[1]) - 1, int(a_.bias_window[2]) - 1)
               : 0;
  }
  __device__ __forceinline__ int bias_entries() const { return arguments_.plan.bias_floats; }
  // Differences of height and width.
  __device__ __forceinline__ int places() const { return (2 * int(a_.window[1]) - 1) * (2 * int(a_.window[2]) - 1); }
  __device__ __forceinline__ const float* table() const {
    return static_cast<const float*>(a_.bias) + head_ * a_.bias_head_stride;
  }
  // Where a token's row starts; null for zeros.
  __device__ __forceinline__ const char* row(int slot, int n) const {
    if (n >= keys()) return nullptr;
    const int64_t offset = offsets()[(arguments_.stride_sets == 1 ? 0 : slot) * slots() + n];
    if (offset >= 0) return a_.tensor[slot].data + offset;
    return a_.pad_qkv ? a_.pad_qkv + (slot * a_.heads + head_) * a_.head_dim * 2 : nullptr;
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
  __device__ __forceinline__ float* bias() const { return reinterpret_cast<float*>(regions() + slots()); }

  const Window3dArgs& a_;
  const Arguments& arguments_;
  int head_, group_, batch_;
  int border_;  // bit per axis: the last window of an axis that is shifted and not cyclic
};

}  // namespace vidattn::cuda
