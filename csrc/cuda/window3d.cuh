// The windows of a token grid as groups of the attention kernels: where a token's rows lie, what is added to a score.
#pragma once
#include "divisor.cuh"
#include "plan.h"
#include "rows.cuh"
#include "window3d_args.h"

namespace vidattn::cuda {

struct WindowArguments {
  Window3dArgs call;
  // What numbers of blocks, tokens and rows of the table are divided by.
  Divisor heads, splits, warps, shares, count[3], height, width, bias_height, bias_width, table_heights, table_widths,
      lines, columns;
  ForwardPlan plan;
  int unit, query_unit;          // bytes that all rows of k and v, or of q, are a multiple of
  int tables, slots;             // where the tables of the tokens start in shared memory, and how many each is for
  int stride_sets;               // 1 if q, k and v have the same strides, else 3
  float factor;                  // scale * log2 e
  float bias_scale, mask_added;  // 1 / scale, mask_value / scale
  bool folds;                    // whether the numbers known to the host allow it
  float scale, mask_value;
  int borders;          // a bit for each axis with two regions in its last window
  int bias_row;         // of a token with itself, as it lies in shared memory
  float hiding_room;    // the largest score, divided by the scale, with which keys of other regions have no weight
  uint32_t all_chunks;  // depth fastest: a bit for each
};

constexpr float kHiddenBias = -1e30f;
constexpr int kStepBytes = 4 * kDepthSteps;

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
  // Which keys a warp's queries see, if those of other regions certainly have no weight.
  struct Seen {
    uint32_t chunks;  // a bit for each that has keys of their region
    uint32_t step;    // of the bias from chunk to chunk; 0 if this lane's keys in a tile are of another region by depth
  };

  __device__ explicit WindowGroup(const Arguments& arguments)
      : WindowGroup(arguments, arguments.heads.remainder(int(blockIdx.x)),
                    arguments.splits.quotient(arguments.heads.quotient(int(blockIdx.x)))) {}
  // The same again, from what keep() left in shared memory.
  struct Kept {};
  __device__ WindowGroup(const Arguments& arguments, Kept) : a_(arguments.call), arguments_(arguments) {
    const int4 numbers = *this->numbers();
    head_ = numbers.x, group_ = numbers.y, batch_ = numbers.z, border_ = numbers.w;
  }
  __device__ void keep() const {
    if (threadIdx.x == 0) *numbers() = make_int4(head_, group_, batch_, border_);
  }
  __device__ WindowGroup(const Arguments& arguments, int head, int group)
      : a_(arguments.call), arguments_(arguments), head_(head), group_(group), border_(0) {
    int rest = group_;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      if (arguments.count[axis].split(rest) == int(a_.count[axis]) - 1) border_ |= arguments.borders & 1 << axis;
    }
    batch_ = rest;
  }

  // Fills the tables of the tokens; to be followed by a barrier.
  __device__ void find_rows() {
    int start[3], rest = group_;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) start[axis] = arguments_.count[axis].split(rest) * int(a_.window[axis]);
    for (int n = threadIdx.x; n < slots(); n += blockDim.x) {
      const Place place = place_of(n);
      bool real = n < keys();
      int source[3], region = 0, token = 0;
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        const int padded = int(a_.count[axis]) * int(a_.window[axis]), grid = int(a_.grid[axis]);
        const int shifted = place.at[axis] + int(a_.shift[axis]);
        source[axis] = start[axis] + shifted;
        if (source[axis] >= padded) source[axis] -= padded;
        real &= source[axis] < grid;
        token = token * grid + source[axis];
        region |= int(shifted >= int(a_.window[axis])) << axis;
      }
      tokens()[n] = real ? token : -1;
      regions()[n] = uint16_t(region & border_);
      for (int set = 0; set < arguments_.stride_sets; ++set) {
        const int64_t* stride = a_.tensor[set].stride;
        offsets()[set * slots() + n] = real ? batch_ * stride[0] + source[0] * stride[1] + source[1] * stride[2] +
                                                  source[2] * stride[3] + head_ * stride[4]
                                            : -1;
      }
      if constexpr (!kDepthFastest) bias_rows()[n] = n < keys() ? 4 * bias_row(place) : 0;
    }
  }

  // Brings the bias to shared memory, as it is to be added. Returns whether this thread met moderate numbers only, and
  // raises `largest` to the largest of them.
  __device__ bool load_bias(float& largest) {
    if (!arguments_.folds) return false;
    if constexpr (kDepthFastest)
      for (int i = threadIdx.x; i < kHiddenFloats; i += blockDim.x) hidden_bias()[i] = kHiddenBias;
    if (!a_.bias_is_table) {
      for (int i = threadIdx.x; i < bias_entries(); i += blockDim.x) bias()[i] = 0.0f;
      return true;
    }
    bool moderate = true;
    const auto at = [&](int row) {
      const float value = table()[row * int(a_.bias_row_stride)] * arguments_.bias_scale;
      moderate &= fabsf(value) <= 1048576.0f;  // 2^20
      largest = fmaxf(largest, fabsf(value));
      return value;
    };
    if constexpr (kDepthFastest) {
      load_pairs(at);
    } else {
      // By rows of the table, which lie side by side for one head.
      const BiasPitch& pitch = arguments_.plan.pitch;
      for (int row = threadIdx.x; row < int(a_.bias_size); row += blockDim.x) {
        int depth = row;
        const int width = arguments_.table_widths.split(depth), height = arguments_.table_heights.split(depth);
        bias()[depth * int(pitch.plane) + height * int(pitch.row) + width] = at(row);
      }
    }
    return moderate;
  }

  // Depth fastest: the bias of a difference of coordinates, query minus key, has its place at [difference of depth / 8]
  // [of height and width][of depth % 8], keys minus queries within the last: 15 steps. Pairs of neighbours are read as
  // one, so there is a second copy without the first step, in which the odd steps stand at even places. A table may be
  // of a window larger than this one.
  template <class At>
  __device__ __forceinline__ void load_pairs(const At& at) const {
    const int depths = int(a_.window[0]), lines = int(a_.window[1]), columns = int(a_.window[2]);
    const int widths = 2 * int(a_.bias_window[2]) - 1, plane = widths * (2 * int(a_.bias_window[1]) - 1);
#pragma unroll 1
    for (int site = threadIdx.x; site < (2 * (depths / 8) - 1) * places(); site += blockDim.x) {
      int eight = site;
      const int column = arguments_.columns.split(eight) - columns + 1;
      const int line = arguments_.lines.split(eight) - lines + 1;
      const int height = turned() ? column : line, width = turned() ? line : column;
      const int first = 7 - 8 * (eight - depths / 8 + 1);  // difference of depth at step 0
      const int row = (first + int(a_.bias_window[0]) - 1) * plane + (height + int(a_.bias_window[1]) - 1) * widths +
                      width + int(a_.bias_window[2]) - 1;
      float *even = bias() + site * kDepthSteps, *odd = even + bias_entries() / 2;
#pragma unroll
      for (int step = 0; step <= kDepthSteps; ++step) {
        if (abs(first - step) >= depths) continue;
        const float value = at(row - step * plane);
        if (step < kDepthSteps) even[step] = value;
        if (step > 0) odd[step - 1] = value;
      }
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

  // ---- Keys that are not seen ----
  // Depth fastest, all keys of a chunk are of one region by height (or width, see turned()), and so are the queries of
  // a warp as a rule: a chunk of another region is skipped. By depth, a lane's pair of keys is of the query's region in
  // all tiles or in none; there the lane reads the bias of hidden keys.

  __device__ __forceinline__ float hiding_room() const { return arguments_.hiding_room; }
  __device__ __forceinline__ Seen all_seen() const { return {arguments_.all_chunks, uint32_t(bias_step())}; }
  __device__ __forceinline__ bool could_hide() const { return kDepthFastest && arguments_.folds && border_; }
  // The region of a chunk, or of the queries at a place of it, by what all of its keys have in common.
  __device__ __forceinline__ int common_region(int chunk) const {
    const int lines = int(a_.window[1]), axis = turned() ? 2 : 1, eight = plane_of(chunk);
    const int line = chunk - eight * lines, depth = eight * 8 + int(a_.shift[0]);
    const bool by_depth = border_ & 1 && a_.shift[0] % 8 == 0 && depth >= a_.window[0];
    return int(by_depth) + 2 * int(border_ >> axis & 1 && line + a_.shift[axis] >= a_.window[axis]);
  }
  // Finds what the queries of `rows` rows from `first` on see. Returns whether they see all of that.
  __device__ __forceinline__ bool hide(Seen& seen, int first, int rows) const {
    const int lane = threadIdx.x % 32, width = this->width(), place = first / 8 + lane % (rows / 8);
    const int mine = common_region(place / width), region = __shfl_sync(~0u, mine, 0);
    if (!__all_sync(~0u, mine == region || 8 * place >= keys())) return false;
    seen.chunks &= __ballot_sync(~0u, common_region(lane) == region);
    if (border_ & 4 && !turned()) return false;
    const int shift = int(a_.shift[0]);
    if (!(border_ & 1) || shift % 8 == 0) return true;
    if (a_.window[0] > 8 || shift % 2 != 0) return false;
    const bool differs = (lane / 4 + shift >= 8) != (lane % 4 * 2 + shift >= 8);
    if (differs) seen.step = 0;
    return true;
  }
  // One for each warp.
  __device__ __forceinline__ float2* measures() const {
    return reinterpret_cast<float2*>(hidden_bias() + kHiddenFloats);
  }

  // Rows behind the last query repeat it.
  __device__ __forceinline__ Query describe(int n) const { return describe(n, all_seen()); }
  __device__ __forceinline__ Query describe(int n, const Seen& seen) const {
    n = min(n, keys() - 1);
    uint32_t address = gpu::shared_address(bias());
    if constexpr (kDepthFastest) {
      if (seen.step == 0) return {gpu::shared_address(hidden_bias()) + 6 * kStepBytes};
      const int site = n / 8, width = this->width(), height = int(a_.window[1]), eight = plane_of(site / width);
      const int line = site / width - eight * height;
      const int difference = (line + height - 1) * (2 * width - 1) + site % width + width - 1;
      const int step = 7 - n % 8 + threadIdx.x % 4 * 2;
      address += ((int(a_.window[0]) / 8 - 1 - eight) * places() + difference) * kStepBytes;
      address += step % 2 == 0 ? step * 4 : bias_entries() / 2 * 4 + (step - 1) * 4;
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
  // Depth fastest: any chunk, and the next one of those whose bias lies at a constant distance.
  __device__ __forceinline__ Keys keys_of_chunk(int chunk, int column, const Seen& seen) const {
    const int eight = plane_of(chunk), line = chunk - eight * int(a_.window[1]);
    const int bias = line * bias_step() - eight * places() * kStepBytes;
    return {seen.step == 0 ? 0 : uint32_t(bias), gpu::shared_address(regions() + 56 * chunk + column), 0};
  }
  __device__ __forceinline__ void next_chunk(Keys& at, const Seen& seen) const {
    at.bias += seen.step, at.region += 112;
  }
  __device__ __forceinline__ int end_of_run(int chunk) const { return (plane_of(chunk) + 1) * int(a_.window[1]); }
  // The next chunk of `keys` keys.
  __device__ __forceinline__ void advance(Keys& at, int keys) const {
    at.region += 2 * keys;
    if constexpr (kDepthFastest) {
      const int height = int(a_.window[1]);
      at.bias += bias_step();
      if (++at.height == height) at.height = 0, at.bias -= bias_step() * height + places() * kStepBytes;
    } else {
      at.bias += 4 * keys;
    }
  }

  template <bool kMasked>
  __device__ __forceinline__ Pairs pairs(const Query (&query)[2], int row, const Keys& keys) const {
    const uint16_t* region = regions() + row;  // behind the last query: any
    Pairs pairs;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pairs.bias[half] = kDepthFastest ? gpu::keep(query[half].bias - keys.bias) : query[half].bias;
      pairs.region[half] = kMasked ? int(region[8 * half]) : 0;
    }
    return pairs;
  }

  // What is added to the products of two queries with two keys of tile n of a chunk, divided by the scale.
  template <bool kMasked>
  __device__ __forceinline__ void folded(float (&added)[4], const Pairs& pairs, const Keys& keys, int n) const {
    if constexpr (kDepthFastest) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 pair = gpu::load_shared<float2>(pairs.bias[half] - n * kStepBytes);
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
    if (kMasked) {
      const uint32_t regions = gpu::load_shared<uint32_t>(keys.region + 16 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (int(regions >> i % 2 * 16 & 15) != pairs.region[i / 2]) added[i] += arguments_.mask_added;
    }
  }

  // The score of a query and key n: all that is added, step by step.
  __device__ __forceinline__ float exact(float product, int row, int n) const {
    row = min(row, keys() - 1);
    float score = product * arguments_.scale;
    if (a_.bias_is_table)
      score += table()[row_of_table(bias_row(row) - bias_row(n) + centre()) * a_.bias_row_stride];
    else if (a_.bias)
      score += static_cast<const float*>(a_.bias)[(int64_t(head_) * a_.tokens + row) * a_.tokens + n];
    if (a_.mask)
      score +=
          static_cast<const float*>(a_.mask)[(int64_t(group_ % int(a_.mask_groups)) * a_.tokens + row) * a_.tokens + n];
    if (border_ && regions()[n] != regions()[row]) score += arguments_.mask_value;
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
  __device__ __forceinline__ int width() const { return kDepthFastest ? 7 : int(a_.window[2]); }
  // Which plane of a window, or which eight of them, a line is in: most depth-fastest windows have one.
  __device__ __forceinline__ int plane_of(int line) const {
    return kDepthFastest && a_.window[0] == 8 ? 0 : arguments_.height.quotient(line);
  }
  // Where a token is in its window.
  struct Place {
    int at[3];
  };
  __device__ __forceinline__ Place place_of(int n) const {
    const int height = int(a_.window[1]), width = this->width(), site = kDepthFastest ? n / 8 : n;
    const int lines = kDepthFastest ? site / width : arguments_.width.quotient(site), column = site - lines * width;
    const int planes = plane_of(lines);
    const int line = lines - planes * height;
    const int depth = kDepthFastest ? planes * 8 + n % 8 : planes;
    return turned() ? Place{{depth, column, line}} : Place{{depth, line, column}};
  }
  // Depth fastest: whether height and width change places in the order of the tokens. So it is in windows of two
  // regions by width and one by height, that all keys of a chunk are of one region.
  __device__ __forceinline__ bool turned() const { return kDepthFastest && (border_ & 6) == 4 && a_.window[1] == 7; }
  // A bias row is a difference of two of these, and the row of a token with itself.
  __device__ __forceinline__ int bias_row(const Place& place) const {
    if (!a_.bias_is_table) return 0;
    if (kDepthFastest) return padded_row(place.at[0], place.at[1], place.at[2]);
    // The number that unravels to the coordinates of the bias.
    int depth = (place.at[0] * int(a_.window[1]) + place.at[1]) * int(a_.window[2]) + place.at[2];
    const int width = arguments_.bias_width.split(depth), height = arguments_.bias_height.split(depth);
    return padded_row(depth, height, width);
  }
  __device__ __forceinline__ int bias_row(int n) const {
    return kDepthFastest ? bias_row(place_of(n)) : bias_rows()[n] / 4;
  }
  __device__ __forceinline__ int padded_row(int x, int y, int z) const {
    return x * int(arguments_.plan.pitch.plane) + y * int(arguments_.plan.pitch.row) + z;
  }
  __device__ __forceinline__ int row_of_table(int padded) const {
    if (kDepthFastest) return padded;  // it is not
    const int plane = int(arguments_.plan.pitch.plane), row = int(arguments_.plan.pitch.row);
    const int rows = 2 * int(a_.bias_window[1]) - 1, columns = 2 * int(a_.bias_window[2]) - 1;
    return (padded / plane * rows + padded % plane / row) * columns + padded % plane % row;
  }
  __device__ __forceinline__ int centre() const { return arguments_.bias_row; }
  // Behind the bias, if depth is fastest.
  __device__ __forceinline__ float* hidden_bias() const { return bias() + bias_entries(); }
  __device__ __forceinline__ int bias_entries() const { return arguments_.plan.bias_floats; }
  // Depth fastest: from chunk to chunk, in bytes.
  __device__ __forceinline__ int bias_step() const { return (2 * width() - 1) * kStepBytes; }
  // Differences of height and width.
  __device__ __forceinline__ int places() const { return (2 * int(a_.window[1]) - 1) * (2 * width() - 1); }
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
  __device__ __forceinline__ int4* numbers() const {
    return reinterpret_cast<int4*>(gpu::shared_memory<unsigned char>() + arguments_.tables - int(kBlockBytes));
  }
  __device__ __forceinline__ int64_t* offsets() const {
    return reinterpret_cast<int64_t*>(gpu::shared_memory<unsigned char>() + arguments_.tables);
  }
  __device__ __forceinline__ int* tokens() const {
    return reinterpret_cast<int*>(offsets() + arguments_.stride_sets * slots());
  }
  __device__ __forceinline__ int* bias_rows() const { return tokens() + slots(); }
  __device__ __forceinline__ uint16_t* regions() const {
    return reinterpret_cast<uint16_t*>(bias_rows() + (kDepthFastest ? 0 : slots()));
  }
  __device__ __forceinline__ float* bias() const { return reinterpret_cast<float*>(regions() + slots()); }

  const Window3dArgs& a_;
  const Arguments& arguments_;
  int head_, group_, batch_;
  int border_;  // bit per axis: the last window of an axis that is shifted and not cyclic
};

}  // namespace vidattn::cuda
