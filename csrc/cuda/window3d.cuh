// The windows of a token grid as groups of the forward pass: what is added to a score, which keys are not seen.
#pragma once
#include "window_tokens.cuh"

namespace vidattn::cuda {

struct WindowArguments : WindowTokenArguments {
  // What numbers of blocks and warps are divided by, and differences of coordinates.
  Divisor splits, warps, shares, lines, columns;
  ForwardPlan plan;
  int numbers;          // where the block's own numbers are in shared memory
  int bias_row;         // of a token with itself, as it lies in shared memory
  float hiding_room;    // the largest score, divided by the scale, with which keys of other regions have no weight
  uint32_t all_chunks;  // depth fastest: a bit for each
  // Depth fastest, for describe(): where the first key's place is, how far eight depths are, both in places of the
  // bias, and bytes to its odd steps, less those of one.
  int first_site, eight_sites, odd_steps;
};

constexpr float kHiddenBias = -1e30f;
constexpr int kStepBytes = 4 * kDepthSteps;

// A window and head of the forward pass.
template <bool kDepthFastest>
class WindowGroup : public WindowTokens<kDepthFastest, kDepthFastest> {
  using Base = WindowTokens<kDepthFastest, kDepthFastest>;
  using Base::a_, Base::head_, Base::group_, Base::batch_, Base::border_;
  using Base::bias_rows, Base::regions, Base::slots, Base::width, Base::plane_of, Base::turned;
  using typename Base::Place;

 public:
  using Base::keys;
  using Arguments = WindowArguments;
  static constexpr bool kWholeChunks = kDepthFastest, kSharesTokens = false;
  // Addresses are of the shared memory.
  struct Query {
    uint32_t bias;  // where the address of its bias starts from
  };
  struct Keys {     // a chunk of them
    uint32_t bias;  // width fastest: of four times the bias rows of this lane's first two keys; depth fastest: what is
                    // taken from the address of the bias
    uint32_t region;  // of those of this lane's first two keys
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
  __device__ WindowGroup(const Arguments& arguments, Kept) : Base(arguments), arguments_(arguments) {
    const int4 numbers = *this->numbers();
    head_ = numbers.x, group_ = numbers.y, batch_ = numbers.z, border_ = numbers.w;
  }
  __device__ void keep() const {
    if (threadIdx.x == 0) *numbers() = make_int4(head_, group_, batch_, border_);
  }
  __device__ WindowGroup(const Arguments& arguments, int head, int group)
      : Base(arguments, head, group), arguments_(arguments) {}

  // Fills the tables of the tokens; to be followed by a barrier.
  __device__ void find_rows() const {
    this->find_tokens([&](int n, const Place& place) {
      if constexpr (!kDepthFastest) bias_rows()[n] = a_.bias_is_table && n < keys() ? padded_row(place) : 0;
    });
  }

  // Brings the bias to shared memory, as it is to be added. Returns whether this thread met moderate numbers only, and
  // gives the largest of them.
  __device__ bool load_bias(float& largest) {
    if (!arguments_.folds) return false;
    if constexpr (kDepthFastest)
      for (int i = threadIdx.x; i < kHiddenFloats; i += blockDim.x) hidden_bias()[i] = kHiddenBias;
    if (!a_.bias_is_table) {
      for (int i = threadIdx.x; i < bias_entries(); i += blockDim.x) bias()[i] = 0.0f;
      return true;
    }
    int most = 0;
    if constexpr (kDepthFastest) {
      load_pairs(most);
    } else {
      // By rows of the table, which lie side by side for one head.
      const BiasPitch& pitch = arguments_.plan.pitch;
      for (int row = threadIdx.x; row < int(a_.bias_size); row += blockDim.x) {
        int depth = row;
        const int width = arguments_.table_widths.split(depth), height = arguments_.table_heights.split(depth);
        bias()[depth * int(pitch.plane) + height * int(pitch.row) + width] = this->bias_of(row, most);
      }
    }
    largest = __int_as_float(most);
    return Base::is_moderate(most);
  }

  // Depth fastest: the bias of a difference of coordinates, query minus key, has its place at [difference of depth / 8]
  // [of height and width][of depth % 8], keys minus queries within the last: 15 steps. Pairs of neighbours are read as
  // one, so there is a second copy without the first step, in which the odd steps stand at even places. A table may be
  // of a window larger than this one.
  __device__ __forceinline__ void load_pairs(int& largest) const {
    const int depths = int(a_.window[0]), lines = int(a_.window[1]), columns = int(a_.window[2]);
    const int widths = 2 * int(a_.bias_window[2]) - 1, plane = widths * (2 * int(a_.bias_window[1]) - 1);
#pragma unroll 1
    for (int site = threadIdx.x; site < (2 * (depths / 8) - 1) * places(); site += blockDim.x) {
      int eight = site;
      const int column = arguments_.columns.split(eight) - columns + 1;
      const int line = arguments_.lines.split(eight) - lines + 1;
      const int height = turned() ? column : line, width = turned() ? line : column;
      const int first = 7 - 8 * (eight - depths / 8 + 1);  // difference of depth at step 0
      const float* entry =
          this->table() + int64_t(arguments_.middle_row + first * plane + height * widths + width) * a_.bias_row_stride;
      float *even = bias() + site * kDepthSteps, *odd = even + bias_entries() / 2;
#pragma unroll
      for (int step = 0; step <= kDepthSteps; ++step, entry -= plane * a_.bias_row_stride) {
        const float value = this->scaled_bias(*entry, largest);
        if (step < kDepthSteps) even[step] = value;
        if (step > 0) odd[step - 1] = value;
      }
    }
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
  // For each warp: the first of its pairs of tiles, and where they end; the lengths that may_hide() needs.
  __device__ __forceinline__ int2* shares() const { return reinterpret_cast<int2*>(numbers() + 1); }
  __device__ __forceinline__ float2* measures() const {
    return reinterpret_cast<float2*>(hidden_bias() + kHiddenFloats);
  }

  // The queries n and n + 8, of this lane. Rows behind the last query repeat it.
  __device__ __forceinline__ void describe(Query (&query)[2], int n, int thread, const Seen& seen) const {
    if constexpr (kDepthFastest) {
      // The place of a query: its differences to the first key in the table, which has 2 * 7 - 1 for each line, then
      // what is the same for all places.
      const uint32_t query_site = uint32_t(n) / 8, last = uint32_t(keys()) / 8 - 1;
      const int step = 7 - thread / 4 % 8 + thread % 4 * 2, bytes = seen.step == 0 ? 0 : kStepBytes;
      uint32_t lane = gpu::shared_address(bias()) + (step % 2 == 0 ? step * 4 : arguments_.odd_steps + step * 4);
      if (seen.step == 0) lane = gpu::shared_address(hidden_bias()) + 6 * kStepBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int site = min(query_site + half, last), lines = uint32_t(site) / 7;
        query[half].bias =
            lane + bytes * (arguments_.first_site + site + 6 * lines - plane_of(lines) * arguments_.eight_sites);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        query[half].bias = gpu::shared_address(bias()) + bias_rows()[min(n + 8 * half, keys() - 1)] + 4 * centre();
    }
  }

  // The chunk of keys from `key` on; depth-fastest windows start at 0. `column` is the first of this lane in 8 keys.
  __device__ __forceinline__ Keys first_keys(int key, int column) const {
    const uint32_t region = gpu::shared_address(regions() + key + column);
    return {kDepthFastest ? 0 : gpu::shared_address(bias_rows() + key + column), region};
  }
  // Depth fastest: any chunk, and the next one of those whose bias lies at a constant distance.
  __device__ __forceinline__ Keys keys_of_chunk(int chunk, int column, const Seen& seen) const {
    const int eight = plane_of(chunk), line = chunk - eight * int(a_.window[1]);
    const int bias = line * bias_step() - eight * places() * kStepBytes;
    return {seen.step == 0 ? 0 : uint32_t(bias), gpu::shared_address(regions() + 56 * chunk + column)};
  }
  __device__ __forceinline__ void next_chunk(Keys& at, const Seen& seen) const {
    at.bias += seen.step, at.region += 112;
  }
  __device__ __forceinline__ int end_of_run(int chunk) const { return (plane_of(chunk) + 1) * int(a_.window[1]); }

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

 private:
  // Four times a token's part of its bias rows in shared memory; the row of two tokens is their difference, from that
  // of a token with itself on.
  __device__ __forceinline__ int padded_row(const Place& place) const {
    const BiasPitch& pitch = arguments_.plan.pitch;
    return this->at_bias_place(place, [&](int depth, int height, int width) {
      return 4 * (depth * int(pitch.plane) + height * int(pitch.row) + width);
    });
  }
  __device__ __forceinline__ int centre() const { return arguments_.bias_row; }
  // Behind the bias, if depth is fastest.
  __device__ __forceinline__ float* hidden_bias() const { return bias() + bias_entries(); }
  __device__ __forceinline__ int bias_entries() const { return arguments_.plan.bias_floats; }
  // Depth fastest: from chunk to chunk, in bytes.
  __device__ __forceinline__ int bias_step() const { return (2 * width() - 1) * kStepBytes; }
  // Differences of height and width.
  __device__ __forceinline__ int places() const { return (2 * int(a_.window[1]) - 1) * (2 * width() - 1); }
  __device__ __forceinline__ int4* numbers() const { return Base::template at<int4>(arguments_.numbers); }
  __device__ __forceinline__ float* bias() const { return Base::template at<float>(arguments_.bias); }

  const Arguments& arguments_;
};

}  // namespace vidattn::cuda
