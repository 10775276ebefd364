// The windows of a token grid as groups of the backward pass: what is added to a score, where gradients go.
#pragma once
#include "window_tokens.cuh"

namespace vidattn::cuda {

struct WindowGradientArguments : WindowTokenArguments {
  BackwardPlan backward;
  int dout_unit, gradient_unit;  // units of dout and out, and of dq, dk and dv
  bool whole_rows;               // whether statistics of rows come from all their scores, not from the forward pass
  bool pad_gradient;
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

// A window and head of the backward pass. The bias lies in shared memory as its table does, or as RowBias says.
template <bool kDepthFastest>
class WindowGradientGroup : public WindowTokens<kDepthFastest, false> {
  using Base = WindowTokens<kDepthFastest, false>;
  using Base::a_, Base::head_, Base::border_, Base::bias_rows, Base::regions, Base::slots;
  using typename Base::Place;

 public:
  using Base::keys, Base::is_real, Base::row, Base::middle_row, Base::tokens;
  using Arguments = WindowGradientArguments;
  static constexpr bool kHasSums = true, kSharesTokens = false;

  __device__ WindowGradientGroup(const Arguments& arguments, int head, int group)
      : Base(arguments, head, group), arguments_(arguments) {}

  // Fills the tables of the tokens; to be followed by a barrier.
  __device__ void find_rows() const {
    this->find_tokens([&](int n, const Place& place) {  // behind the last key, any row that the table has
      bias_rows()[n] = a_.bias_is_table && this->is_key(n) ? 4 * this->bias_row(place) : 0;
    });
  }

  // Brings the bias to shared memory, as it is to be added. Returns whether this thread met moderate numbers only.
  __device__ bool load_bias() {
    if (!arguments_.folds) return false;
    if (!a_.bias_is_table) {
      for (int i = threadIdx.x; i < bias_entries(); i += blockDim.x) bias()[i] = 0.0f;
      return true;
    }
    int most = 0;
    for (int row = threadIdx.x; row < int(a_.bias_size); row += blockDim.x) bias()[row] = this->bias_of(row, most);
    return Base::is_moderate(most);
  }

  // Shows each difference of coordinates that the table has, query minus key, to visit(row, depth, height, width), each
  // to one thread.
  template <class Visit>
  __device__ __forceinline__ void for_each_difference(Visit visit) const {
    for (int i = threadIdx.x; i < table_rows(); i += blockDim.x) {
      int depth = i;
      const int width = arguments_.table_widths.split(depth), height = arguments_.table_heights.split(depth);
      visit(this->table_row(depth, height, width), depth - int(a_.bias_window[0]) + 1,
            height - int(a_.bias_window[1]) + 1, width - int(a_.bias_window[2]) + 1);
    }
  }
  // The same with the bias as it is to be added. Returns whether this thread met moderate numbers only.
  template <class Visit>
  __device__ __forceinline__ bool for_each_bias(Visit visit) const {
    int most = 0;
    if (a_.bias_is_table)
      for_each_difference(
          [&](int row, int depth, int height, int width) { visit(depth, height, width, this->bias_of(row, most)); });
    return Base::is_moderate(most);
  }

  __device__ __forceinline__ const Arguments& gradients() const { return arguments_; }
  __device__ __forceinline__ const char* dout(int n) const { return row(kDout, n); }
  __device__ __forceinline__ int dout_unit() const { return arguments_.dout_unit; }
  // Where a gradient goes; null for padding.
  __device__ __forceinline__ char* gradient(Slot slot, int n) const {
    return is_real(n) ? const_cast<char*>(row(slot, n)) : nullptr;
  }
  __device__ __forceinline__ float scale() const { return arguments_.scale; }
  // Keys and records have one place; tiles of queries take turns at two, the first tile at the first.
  static constexpr int kStages = 2;
  static constexpr __device__ int half() { return 0; }
  static constexpr __device__ int records() { return 0; }
  static constexpr __device__ int turn() { return 0; }

  // Where the address of a key's bias starts from.
  __device__ __forceinline__ uint32_t key_bias(int n) const {
    return gpu::shared_address(bias()) + 4 * middle_row() - bias_rows()[min(n, keys() - 1)];
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
  __device__ __forceinline__ int table_rows() const { return int(a_.bias_size); }
  __device__ __forceinline__ int head() const { return head_; }
  __device__ __forceinline__ float mask_added() const { return arguments_.mask_added; }

  __device__ __forceinline__ float* bias() const { return Base::template at<float>(arguments_.bias); }

 private:
  __device__ __forceinline__ int bias_entries() const { return arguments_.backward.bias_floats; }

  const Arguments& arguments_;
};

}  // namespace vidattn::cuda
