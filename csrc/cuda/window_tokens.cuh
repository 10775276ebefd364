// The tokens of a window, by their order in shared memory: where their rows lie, of which region they are, and what is
// added to a score of two of them.
#pragma once
#include "divisor.cuh"
#include "plan.h"
#include "rows.cuh"
#include "window3d_args.h"

namespace vidattn::cuda {

struct WindowTokenArguments {
  Window3dArgs call;
  // What numbers of blocks, tokens and rows of the table are divided by.
  Divisor heads, count[3], height, width, bias_height, bias_width, table_heights, table_widths;
  int padded[3];   // tokens of each axis, up to a whole window
  int borders;     // a bit for each axis with two regions in its last window
  int middle_row;  // of the table: for a token with itself; 0 without one
  // The axes of the call may come in another order (order_axes). What counts tokens of the grid and rows of the table
  // does not change by that: steps along the axes.
  int token_step[3], table_step[3];
  int keys;   // of a window, those that only fill up an eight included
  int slots;  // entries of the tables of the tokens; the last ones are no keys
  // Places in shared memory: of what tells where tensors start, of the tables of the tokens, and of the bias.
  int bases, offsets, tokens, regions, bias_rows, bias;
  // From batch element to batch element, and from head to head: of the tensors in bytes, of log-sum-exp and a dense
  // bias in numbers. The bias is that of a type of window.
  int64_t batch_stride[kBases], head_stride[kBases];
  int unit[kSlots];               // bytes that all rows of a tensor are a multiple of: 16, 4 or 2
  uint32_t token_stride[kSlots];  // the one stride that counts through its grid, in bytes, if there is one
  uint32_t plain;                 // a bit for each tensor that has one, and whose rows are whole pieces of 16 bytes
  int stride_sets;                // different strides among the tensors that have none
  int set_of[kSlots];             // which of them a tensor has; negative if it has one
  Slot slot_of[kSlots];           // a tensor that has them
  float scale, mask_value;
  float factor;                  // scale * log2 e
  float bias_scale, mask_added;  // 1 / scale, mask_value / scale
  bool folds;                    // whether the numbers known to the host allow it
};

// The order of a window's tokens in shared memory. The kernels do not care, so there are two:
//   kDepthFastest = false  as in the grid, width fastest.
//   kDepthFastest = true   (depth / 8, height, width, depth % 8), for a depth that is a multiple of 8, or 7, and a
//   width of 7.
//     Eight keys then are one place and eight depths, and so are eight queries: in a product of the two the differences
//     in height and width are the same for all lanes, and the difference in depth is always the same for one lane. So a
//     lane finds the bias of its two keys in two neighbouring entries of a table, at an address that moves by a
//     constant from place to place. 7 places make a chunk of keys.
// kTurns: whether height and width may change places in it, see turned().
template <bool kDepthFastest, bool kTurns>
class WindowTokens {
 public:
  __device__ __forceinline__ int keys() const { return common_.keys; }
  // In the backward pass, a depth of 7 may be filled up to eight.
  __device__ __forceinline__ bool is_key(int n) const {
    return n < keys() && (!kFillsUp || int(uint32_t(n) % 8) < int(a_.window[0]));
  }
  __device__ __forceinline__ int head_dim() const { return int(a_.head_dim); }
  // Bytes that all rows of a tensor are a multiple of.
  __device__ __forceinline__ int unit(Slot slot) const { return common_.unit[slot]; }
  __device__ __forceinline__ float factor() const { return common_.factor; }
  __device__ __forceinline__ bool masks() const { return border_ != 0; }

  template <class Entry>
  static __device__ __forceinline__ Entry* at(int place) {
    return reinterpret_cast<Entry*>(gpu::shared_memory<unsigned char>() + place);
  }

  static constexpr bool kFillsUp = kDepthFastest && !kTurns;

  // The number of token n in its grid, kPadding or kNoToken; those of all slots.
  __device__ __forceinline__ int token(int n) const { return n < keys() ? tokens()[n] : kNoToken; }
  __device__ __forceinline__ const int* tokens() const { return at<const int>(common_.tokens); }
  // A padding query has no output, so nobody needs it.
  __device__ __forceinline__ bool is_real(int n) const { return token(n) >= 0; }

  // Any address of a tensor.
  __device__ __forceinline__ const char* readable(Slot slot) const { return a_.tensor[slot].data; }
  __device__ __forceinline__ const char* query(int n) const { return row(kQ, n); }
  // Where a token's row starts; null for zeros.
  __device__ __forceinline__ const char* row(Slot slot, int n) const {
    const int token = this->token(n), set = common_.set_of[slot];
    if (token < 0) return token == kPadding ? pad_row(slot) : nullptr;
    return first_row(slot) +
           (set < 0 ? uint64_t(uint32_t(token)) * common_.token_stride[slot] : offsets()[set * slots() + n]);
  }
  // Starts to copy a piece of a token's row into shared memory, zeros for kNoToken.
  __device__ __forceinline__ void copy_piece(Slot slot, int n, int piece, unsigned char* to) const {
    copy_piece_of_row(to, n < 0 ? nullptr : row(slot, n), piece, head_dim(), unit(slot), readable(slot));
  }
  // Whether piece() is for this tensor.
  __device__ __forceinline__ bool is_plain(Slot slot) const { return common_.plain >> slot & 1; }
  __device__ __forceinline__ PieceOfRows piece(Slot slot, int piece) const {
    const char *readable = a_.tensor[slot].data, *padding = pad_row(slot);
    const int least = piece * 8 >= head_dim() ? INT32_MAX : padding ? kPadding : 0;
    return {gpu::keep(first_row(slot) + 16 * piece), padding ? padding + 16 * piece : readable,
            common_.token_stride[slot], least};
  }
  // The rows of such a tensor, and the log-sum-exp, by the numbers of real tokens in the grid.
  __device__ __forceinline__ PlainRows<const char> plain_rows(Slot slot) const {
    return {first_row(slot), common_.token_stride[slot]};
  }
  __device__ __forceinline__ PlainRows<float> log_sums() const {
    return {static_cast<float*>(a_.lse) + bases()[kLogSums], uint32_t(a_.heads)};
  }
  __device__ __forceinline__ float* lse(int token) const { return log_sums().at(token); }

  // The score of a query and key n, step by step as the reference takes it: for numbers of any size.
  __device__ __forceinline__ float exact(float product, int query, int n) const {
    if (kFillsUp && !(is_key(query) && is_key(n))) return __int_as_float(0xff800000);  // -inf: it has no weight
    query = min(query, keys() - 1);
    float score = product * common_.scale;
    if (a_.bias_is_table) {
      const int row = bias_row(place_of(query)) - bias_row(place_of(n)) + middle_row();
      score += table()[row * a_.bias_row_stride];
    } else if (a_.bias) {
      score += static_cast<const float*>(a_.bias)[bases()[kDenseBias] + int64_t(query) * a_.tokens + n];
    }
    if (a_.mask) {
      const int64_t group = group_ % int(a_.mask_groups);
      score += static_cast<const float*>(a_.mask)[(group * a_.tokens + query) * a_.tokens + n];
    }
    if (border_ && regions()[n] != regions()[query]) score += common_.mask_value;
    return score;
  }
  // The row of the table for a token with itself; 0 without a table.
  __device__ __forceinline__ int middle_row() const { return common_.middle_row; }

 protected:
  __device__ __forceinline__ WindowTokens(const WindowTokenArguments& arguments)
      : a_(arguments.call), common_(arguments) {}
  // A head and a group, by their numbers.
  __device__ __forceinline__ WindowTokens(const WindowTokenArguments& arguments, int head, int group)
      : WindowTokens(arguments) {
    head_ = head, group_ = group, border_ = 0;
    int rest = group;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis)
      if (arguments.count[axis].split(rest) == int(a_.count[axis]) - 1) border_ |= arguments.borders & 1 << axis;
    batch_ = rest;
  }

  // Where a token is in its window.
  struct Place {
    int at[3];
  };

  // Fills the tables of the tokens, and calls visit(n, place) for each of their entries; to be followed by a barrier.
  template <class Visit>
  __device__ __forceinline__ void find_tokens(Visit visit) const {
    if (const int slot = threadIdx.x; slot < kBases) {
      int64_t base = batch_ * common_.batch_stride[slot] + head_ * common_.head_stride[slot];
      if (slot == kDenseBias && a_.window_types)
        base += a_.window_types[uint32_t(group_) % uint32_t(a_.type_groups)] * (a_.heads * a_.bias_size);
      bases()[slot] = base;
    }
    int start[3], rest = group_;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis)
      start[axis] = common_.count[axis].split(rest) * int(a_.window[axis]) + int(a_.shift[axis]);
    for (int n = threadIdx.x; n < slots(); n += blockDim.x) {
      const Place place = place_of(n);
      bool real = true;
      int region = 0, token = 0, source[3];
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        const int grid = int(a_.grid[axis]);
        source[axis] = start[axis] + place.at[axis];
        if (source[axis] >= common_.padded[axis]) source[axis] -= common_.padded[axis];
        real &= source[axis] < grid;
        token += source[axis] * common_.token_step[axis];
        if (place.at[axis] + int(a_.shift[axis]) >= int(a_.window[axis])) region |= 1 << axis;
      }
      at<int>(common_.tokens)[n] = !is_key(n) ? kNoToken : real ? token : kPadding;
      regions()[n] = uint16_t(region & border_);
#pragma unroll 1
      for (int set = 0; set < common_.stride_sets; ++set) {
        const int64_t* stride = a_.tensor[common_.slot_of[set]].stride;
        offsets()[set * slots() + n] = source[0] * stride[1] + source[1] * stride[2] + source[2] * stride[3];
      }
      visit(n, place);
    }
  }

  __device__ __forceinline__ int width() const { return kDepthFastest ? 7 : int(a_.window[2]); }
  // Which plane of a window, or which eight of them, a line is in.
  __device__ __forceinline__ int plane_of(int line) const { return common_.height.quotient(line); }
  __device__ __forceinline__ Place place_of(int n) const {
    const uint32_t site = kDepthFastest ? uint32_t(n) / 8 : n;
    const int height = int(a_.window[1]), width = this->width();
    const int lines = kDepthFastest ? site / 7 : common_.width.quotient(site), column = site - lines * width;
    const int planes = plane_of(lines);
    const int line = lines - planes * height;
    const int depth = kDepthFastest ? planes * 8 + int(uint32_t(n) % 8) : planes;
    return turned() ? Place{{depth, column, line}} : Place{{depth, line, column}};
  }
  // Whether height and width change places in the order of the tokens. So it is in windows of two regions by width and
  // one by height, that all keys of a chunk are of one region.
  __device__ __forceinline__ bool turned() const { return kTurns && (border_ & 6) == 4 && a_.window[1] == 7; }

  // Calls visit with the coordinates by which the bias of a token goes: those of the number that they unravel to.
  template <class Visit>
  __device__ __forceinline__ int at_bias_place(const Place& place, Visit visit) const {
    int depth = (place.at[0] * int(a_.window[1]) + place.at[1]) * int(a_.window[2]) + place.at[2];
    const int width = common_.bias_width.split(depth), height = common_.bias_height.split(depth);
    return visit(depth, height, width);
  }
  // The row of the table for two tokens is the difference of these, from that of a token with itself on.
  __device__ __forceinline__ int bias_row(const Place& place) const {
    return at_bias_place(place, [&](int depth, int height, int width) { return table_row(depth, height, width); });
  }
  __device__ __forceinline__ int table_row(int depth, int height, int width) const {
    return depth * common_.table_step[0] + height * common_.table_step[1] + width * common_.table_step[2];
  }
  __device__ __forceinline__ const float* table() const {
    return static_cast<const float*>(a_.bias) + head_ * a_.bias_head_stride;
  }
  // A bias as it is added to a product; its size, in bits, goes into largest.
  __device__ __forceinline__ float bias_of(int row, int& largest) const {
    return scaled_bias(table()[row * a_.bias_row_stride], largest);
  }
  __device__ __forceinline__ float scaled_bias(float entry, int& largest) const {
    const float bias = entry * common_.bias_scale;
    largest = max(largest, __float_as_int(bias) & INT32_MAX);  // that of NaN is larger than all others
    return bias;
  }
  static __device__ __forceinline__ bool is_moderate(int largest) { return largest <= __float_as_int(1048576.0f); }

  __device__ __forceinline__ int slots() const { return common_.slots; }
  __device__ __forceinline__ uint16_t* regions() const { return at<uint16_t>(common_.regions); }
  __device__ __forceinline__ int* bias_rows() const { return at<int>(common_.bias_rows); }

 private:
  // Where the row of token 0 of the grid starts.
  __device__ __forceinline__ const char* first_row(Slot slot) const { return a_.tensor[slot].data + bases()[slot]; }
  // Distances from the start of a tensor, of log-sum-exp and a dense bias in numbers: an address that comes from shared
  // memory might be of any memory, to the compiler.
  __device__ __forceinline__ int64_t* bases() const { return at<int64_t>(common_.bases); }
  // Of the tokens from there, for each set of strides.
  __device__ __forceinline__ int64_t* offsets() const { return at<int64_t>(common_.offsets); }
  // Null for zeros.
  __device__ __forceinline__ const char* pad_row(Slot slot) const {
    return a_.pad_qkv && (slot == kK || slot == kV) ? a_.pad_qkv + (slot * int(a_.heads) + head_) * int(a_.head_dim) * 2
                                                    : nullptr;
  }

 protected:
  const Window3dArgs& a_;
  const WindowTokenArguments& common_;
  int head_, group_, batch_;
  int border_;  // a bit for each axis of two regions in this window
};

}  // namespace vidattn::cuda
