// The backward pass of windows in the depth-fastest order (window_tokens.cuh), by one block of threads. Depth, height
// and width may be any axes of the window (BackwardPlan::axes). Where depth is 7, the eighth key has no weight.
//
// A row is what has one height: 7 places of 8 depths, 56 tokens. Each warp owns a row of keys, with dk and dv in
// registers. All warps look at the same row of queries at a time. So the difference in height differs from warp to
// warp, that in width is known to the compiler, and that in depth is the same for a lane in all products: a lane adds
// up the gradient of the bias in registers, by difference of width and its two depths, and keeps the sums where no
// other thread is at that time.
//
// While the warps multiply, the next row of queries, the gradients of its context and the context are on their way to
// shared memory; who has copied a piece of them then finds its part of delta. dq of a row needs all keys: the warps
// leave dS of two rows, and four of them sum over the keys. Before dq of a window's last rows, the next window begins:
// all of it but its keys is on its way while dq, dk and dv of this one are written.
//
// Without more ado, shared memory would be what takes longest. So a warp keeps its keys and values in registers, as
// operands of the products. Then there are registers for one place of queries at a time, not for two: products that sum
// over queries take twice as many instructions, each half as long.
#pragma once
#include "depth_fastest_rows.cuh"

namespace vidattn::cuda {

// All rows of tensors are multiples of 16 bytes, at one stride from token to token. Seven warps, whatever the window
// has of heights: the first ones own keys, and all share copies and dq.
template <class T>
struct DepthFastestBackward : Backward<T, 32, WindowGradientGroup<true>, kRowTokens, kRowTokens> {
  using Group = WindowGradientGroup<true>;
  using Base = Backward<T, 32, Group, kRowTokens, kRowTokens>;
  using Base::arguments, Base::plan, Base::group, Base::warp, Base::lane, Base::at;
  using Place = DepthFastestPlaces;
  using Layout = Rows<32>;
  static_assert(kRowTokens * Layout::kPieces == 32 * kPlaces, "a thread for each piece of a row");

  // What follows from the thread's number is found anew for each of these, and not kept: the registers are needed.
  __device__ DepthFastestBackward(const WindowGradientArguments& given, const Group& of)
      : Base(given, of, int(gpu::keep(threadIdx.x) & 255)) {}
  __device__ __forceinline__ DepthFastestBackward again() const { return {arguments, group}; }

  __device__ __forceinline__ int rows() const { return group.keys() / kRowTokens; }
  __device__ __forceinline__ bool owns_keys() const { return warp < rows(); }
  __device__ __forceinline__ uint32_t address(int place) const { return gpu::shared_address(at(place)); }
  __device__ __forceinline__ PairRecord* pairs() const { return reinterpret_cast<PairRecord*>(at(Place::kPairs)); }
  __device__ __forceinline__ float* sums() const { return reinterpret_cast<float*>(at(Place::kTable)); }
  // Where the warp's keys lie, an address of shared memory.
  __device__ __forceinline__ uint32_t keys_at() const {
    return address(kKeysPlace) + min(warp, rows() - 1) * kRowBytes;
  }
  // A row of queries; the gradients of their context lie behind it.
  static __device__ __forceinline__ int queries_of(int first) {
    return Place::kQueries + (is_odd_row(first) ? 2 * kRowBytes : 0);
  }
  // From row to row of queries: a key that is none stays where it is.
  __device__ __forceinline__ int bias_step() const { return group.is_key(lane / 4) ? kPairs * kPairBytes : 0; }
  // The row of queries that the addresses are for: the number of its first one. They count the rows, so that no other
  // register does.
  __device__ __forceinline__ int first_query(const RowAddresses& to) const {
    return int((gpu::keep(to.pairs) - address(Place::kPairs)) / (sizeof(PairRecord) / 2) & ~7u);
  }

  // ---- Rows of tokens ----

  // A thread copies one piece of a row of tokens.
  __device__ __forceinline__ int piece() const { return lane % Layout::kPieces; }
  __device__ __forceinline__ int row_token() const { return warp * 8 + lane / Layout::kPieces; }
  __device__ __forceinline__ uint32_t piece_place() const { return Layout::place(row_token(), piece()); }
  __device__ __forceinline__ int token(int n) const { return group.tokens()[n]; }

  __device__ __forceinline__ void copy_keys(Slot slot, int place) const {
    const PieceOfRows rows = group.piece(slot, piece());
#pragma unroll 1
    for (int row = 0; row < this->rows(); ++row)
      rows.copy(at(place) + row * kRowBytes + piece_place(), this->token(row * kRowTokens + row_token()));
  }

  // Of the queries from `first` on, with the gradients of their context and, to find delta, the context.
  template <bool kExact>
  __device__ __forceinline__ void copy_row(int first) const {
    const int token = this->token(first + row_token());
    unsigned char* to = at(queries_of(first)) + piece_place();
    group.piece(kQ, piece()).copy(to, token);
    group.piece(kDout, piece()).copy(to + kRowBytes, token);
    if (!kExact) group.piece(kOut, piece()).copy(at(Place::kContext) + piece_place(), token);
    gpu::cp_async_commit();
  }

  // From what this thread has copied, which has arrived. Exact: of the record of the query.
  template <bool kExact>
  __device__ __forceinline__ void find_deltas(int first) const {
    const int n = first + row_token();
    float minus;
    if constexpr (kExact) {
      minus = this->records()[n].minus_delta;
    } else {
      const uint4 words[2] = {gpu::load_shared<uint4>(address(queries_of(first) + kRowBytes) + piece_place()),
                              gpu::load_shared<uint4>(address(Place::kContext) + piece_place())};
      const T *x = reinterpret_cast<const T*>(&words[0]), *y = reinterpret_cast<const T*>(&words[1]);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(to_float(x[i]), to_float(y[i]), sum);
      minus = -this->sum_of_quad(sum);
    }
    if (piece() == 0) pairs()[n / 2].minus_delta[n % 2] = minus;
  }

  // Whether the place of the values is free as soon as the last row of queries has met the keys: dS of one row alone is
  // elsewhere.
  __device__ __forceinline__ bool values_are_early() const { return rows() % 2; }
  // Brings to shared memory what has room while gradients of the window before are written; the tables of the tokens
  // are this one's. Returns whether this thread met moderate numbers only.
  __device__ __forceinline__ bool begin_window() const {
    if (threadIdx.x == 0) *reinterpret_cast<uint32_t*>(at(Place::kMasks)) = group.masks();
    if (values_are_early()) copy_keys(kV, Place::kValues);
    copy_row<false>(0);
    return read_log_sums();
  }
  // Brings the rest, when those are written.
  __device__ __forceinline__ void bring_keys() const {
    for (int n = threadIdx.x; n < group.keys(); n += blockDim.x) written_tokens()[n] = token(n);
    if (threadIdx.x < 3) {
      const Slot slot = Slot(kDq + threadIdx.x);
      starts()[threadIdx.x] = group.plain_rows(slot).first - arguments.call.tensor[slot].data;
    }
    copy_keys(kK, kKeysPlace);
    if (!values_are_early()) copy_keys(kV, Place::kValues);
    gpu::cp_async_commit();
  }
  // For writing gradients when the tables are those of the next window: the tokens, and where rows of dq, dk and dv
  // start.
  __device__ __forceinline__ int* written_tokens() const { return reinterpret_cast<int*>(at(Place::kWritten)); }
  __device__ __forceinline__ int64_t* starts() const {
    return reinterpret_cast<int64_t*>(at(Place::kWritten + 4 * Place::kTokens));
  }

  // Returns whether this thread met moderate numbers only. A query that is none has no weights.
  __device__ __forceinline__ bool read_log_sums() const {
    bool moderate = true;
#pragma unroll 1
    for (int n = 32 * warp + lane; n < group.keys(); n += 32 * kPlaces) {
      float minus = -plus_infinity();
      if (const int token = this->token(n); token >= 0) {
        minus = -*group.lse(token) * kLog2e;
        moderate &= fabsf(minus) <= kLargestLogSum;
      }
      pairs()[n / 2].minus_log_sum[n % 2] = minus;
    }
    return moderate;
  }

  // Fills what is the same for all windows. Returns whether the block met moderate numbers only.
  __device__ __forceinline__ bool begin() const {
    for (int i = threadIdx.x; i < Place::kTableFloats; i += blockDim.x) sums()[i] = 0.0f;
    if (arguments.pad_gradient)
      for (int i = threadIdx.x; i < plan.warps * 2 * Layout::kDim; i += blockDim.x) this->pad(0)[i] = 0.0f;
    for (int i = threadIdx.x; i < plan.bias_floats; i += blockDim.x)
      reinterpret_cast<float*>(at(Place::kBias))[i] = i < RowBias::kPairOfNoKey * kPairBytes / 4 ? 0.0f : kNoWeight;
    __syncthreads();
    const bool moderate = group.for_each_bias([&](int depth, int height, int width, float value) {
      RowBias::store(at(Place::kBias), depth, height, width, value);
    });
    return __syncthreads_and(moderate && arguments.folds);
  }

  // For the first row of queries.
  __device__ __forceinline__ RowAddresses addresses() const {
    RowAddresses to;
    const int column = lane % 4 * 2, depth = lane / 4, difference = kPlaces - 1 - warp;
    to.queries = address(queries_of(0)) + Layout::place(lane % 8, lane / 8);
    to.scores = address(Place::kScores) + (warp * kRowTokens + depth) * kScoreBytes + column * 2;
    to.pairs = address(Place::kPairs) + lane % 4 * sizeof(PairRecord);
    const int pair = group.is_key(depth) ? difference * kPairs + 7 + column - depth : RowBias::kPairOfNoKey;
    to.bias = address(Place::kBias) + pair * kPairBytes + (kPlaces - 1) * 16;
    to.sums = address(Place::kTable) + difference * kWidths * kSumBytes + lane * 8;
    return to;
  }

  template <bool kExact, bool kMasked>
  __device__ __forceinline__ RowScores<kExact, kMasked, Group> scores_of(int first) const {
    const int column = lane % 4 * 2, depth = lane / 4;
    RowScores<kExact, kMasked, Group> scores{group};
    if constexpr (kExact) {
      scores.first_query = first + column, scores.first_key = warp * kRowTokens + depth, scores.keys = keys_at();
      scores.records = this->records() + scores.first_query;
    } else if constexpr (kMasked) {
      const int height = (group.region(first) ^ group.region(warp * kRowTokens)) & 2;
      for (int i = 0; i < 2; ++i) {
        const bool apart = height || (group.region(column + i) ^ group.region(depth)) & 1;
        scores.more[i] = apart ? 0.0f : group.mask_added();
      }
      scores.wide = 0;
      for (int place = 0; place < kPlaces; ++place) scores.wide |= uint32_t(group.region(place * 8) >> 2 & 1) << place;
    }
    return scores;
  }

  // dQ of one or two rows of queries, from `first` on, four places at a time: that is work for the first warps, one on
  // each quarter of a multiprocessor.
  __device__ __forceinline__ void write_queries(int first, int rows_of_queries) const {
    const int places = rows_of_queries * kPlaces;
#pragma unroll 1
    for (int start = 4 * warp; start < places; start += 4 * plan.warps) {
      uint32_t scores[2];
      for (int tile = 0; tile < 2; ++tile) {
        const int place = min(start + 2 * tile + lane / 8 % 2, places - 1);
        scores[tile] = address(Place::kScores) + place * 16 + (place < kPlaces ? 0 : kScoresDistance - kPlaces * 16);
      }
      float dq[2][4][4];
      sum_over_keys<T>(dq, address(kKeysPlace), scores, rows());
      const float scale = group.scale();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = min(start + i, places);
        uint32_t words[4];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          words[n] = gpu::pack<T>(dq[i / 2][n][i % 2 * 2] * scale, dq[i / 2][n][i % 2 * 2 + 1] * scale);
        write_words(kDq, place < places ? written_tokens()[first + place * 8 + lane / 4] : kNoToken, words);
      }
    }
  }
  // A row of a gradient, of which a lane has two neighbouring elements of each eight; nothing for a token below 0.
  __device__ __forceinline__ void write_words(Slot slot, int token, const uint32_t (&words)[4]) const {
    const PlainRows<const char> rows{arguments.call.tensor[slot].data + starts()[slot - kDq],
                                     arguments.token_stride[slot]};
    uint32_t* to = reinterpret_cast<uint32_t*>(const_cast<char*>(rows.at(max(token, 0)))) + lane % 4;
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (token >= 0 && n * 8 < group.head_dim()) to[4 * n] = words[n];
  }

  // Writes dK or dV of the warp's keys, times `scale`; what is of padding is added to the sums of the warp.
  __device__ __forceinline__ void write_keys(Slot slot, float (&sum)[3][4][4], float (&last)[2][4], float scale) const {
    bool padded = false;
#pragma unroll
    for (int place = 0; place < kPlaces; ++place) {
      const int token = written_tokens()[warp * kRowTokens + place * 8 + lane / 4];
      padded |= token < 0;
      uint32_t words[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float* pair = place + 1 < kPlaces ? &sum[place / 2][n][place % 2 * 2] : &last[n / 2][n % 2 * 2];
        pair[0] *= scale, pair[1] *= scale;
        words[n] = gpu::pack<T>(pair[0], pair[1]);
        if (place + 1 == kPlaces) words[n] = gpu::transpose(words[n]);
      }
      write_words(slot, token, words);
    }
    if (arguments.pad_gradient && __any_sync(~0u, padded)) add_padding(slot, sum, last);
  }

  // Adds the rows of padding to the sums of the warp.
  __device__ __forceinline__ void add_padding(Slot slot, const float (&sum)[3][4][4], const float (&last)[2][4]) const {
    const int start = warp * kRowTokens, column = lane % 4 * 2;
    float* to = this->pad(warp) + (slot == kDk ? 0 : Layout::kDim);
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float total = 0.0f;
#pragma unroll
        for (int place = 0; place + 1 < kPlaces; ++place)
          total += written_tokens()[start + place * 8 + lane / 4] >= 0 ? 0.0f : sum[place / 2][n][place % 2 * 2 + j];
#pragma unroll
        for (int bits = 4; bits < 32; bits *= 2) total += __shfl_xor_sync(~0u, total, bits);
        if (lane < 4) to[n * 8 + column + j] += total;
      }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < 2; ++j)
        total += written_tokens()[start + (kPlaces - 1) * 8 + column + j] >= 0 ? 0.0f : last[n / 2][n % 2 * 2 + j];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (lane % 4 == 0) to[n * 8 + lane / 4] += total;
    }
    __syncwarp();
  }

  // All queries of a window meet its keys, which are on their way to shared memory. Begins the next window, and returns
  // what that does.
  template <bool kExact>
  __device__ __forceinline__ bool run_window() const {
    gpu::cp_async_wait<0>();
    find_deltas<kExact>(0);
    __syncthreads();
    DepthFastestKeys<T> keys;
    keys.reset();
    if (!kExact)
#pragma unroll
      for (int t = 0; t <= keys.kTiles; ++t) keys.load(t, keys_at());
    RowAddresses to = again().addresses();
#pragma unroll 1
    while (first_query(to) < group.keys()) {
      if (const int next = first_query(to) + kRowTokens; next < group.keys()) again().template copy_row<kExact>(next);
      if (again().owns_keys()) {
        if (!kExact && gpu::load_shared<uint32_t>(address(Place::kMasks)))
          keys.add(to, again().template scores_of<false, true>(first_query(to)));
        else
          keys.add(to, again().template scores_of<kExact, false>(first_query(to)));
      } else {
        to.next_place(kPlaces);
      }
      gpu::cp_async_wait<0>();
      const int next = first_query(to);
      if (next < group.keys()) again().template find_deltas<kExact>(next);
      const int last = kExact || is_odd_row(next) ? 1 : 2;  // rows of queries whose dS is there
      to.next_row(!is_odd_row(next), again().bias_step(), kExact ? 0 : kScoresDistance);
      __syncthreads();
      if (next >= group.keys() || (!kExact && last == 1)) continue;
      again().write_queries(next - last * kRowTokens, last);
      __syncthreads();
    }
    bool moderate = true;
    if (const Progress* now = gpu::shared_memory<Progress>(); now->group + 1 < now->end) {
      const Group next(arguments, now->head, now->group + 1);
      next.find_rows();
      __syncthreads();
      moderate = DepthFastestBackward(arguments, next).begin_window();
    }
    const int rows = kExact || this->rows() % 2 ? 1 : 2;
    again().write_queries(group.keys() - rows * kRowTokens, rows);
    if (const DepthFastestBackward last = again(); last.owns_keys()) {
      last.write_keys(kDk, keys.dk, keys.dk_last, group.scale());
      last.write_keys(kDv, keys.dv, keys.dv_last, 1.0f);
    }
    return moderate;
  }

  // The share's sums of the table's gradient. Lanes with one difference of depth are added in their order.
  __device__ __forceinline__ void write_table() const {
    if (!plan.table_floats) return;
    float* part =
        arguments.table_parts + (int64_t(this->share()) * arguments.call.heads + group.head()) * group.table_rows();
    group.for_each_difference([&](int n, int depth, int height, int width) {
      float sum = 0.0f;
      if (abs(depth) < 8 && abs(height) < kPlaces && abs(width) < kPlaces) {
        const float* from = sums() + ((height + kPlaces - 1) * kWidths + width + kPlaces - 1) * (kSumBytes / 4);
        for (int key = max(0, -depth); key < min(8, 8 - depth); ++key) {
          const int query = key + depth;
          sum += from[(key * 4 + query / 2) * 2 + query % 2];
        }
      }
      part[n] = sum;
    });
  }
};

// Not the usual way through a window: a function of its own, so that the latter has all registers.
template <class T>
__device__ __attribute__((noinline)) bool run_window_exactly(const WindowGradientArguments& arguments, int head,
                                                             int g) {
  const WindowGradientGroup<true> group(arguments, head, g);
  const DepthFastestBackward<T> backward(arguments, group);
  backward.scan_rows();
  __syncthreads();
  return backward.template run_window<true>();
}

template <class T>
__device__ __forceinline__ void depth_fastest_backward(const WindowGradientArguments& arguments) {
  using B = DepthFastestBackward<T>;
  using Group = WindowGradientGroup<true>;
  Progress* const now = gpu::shared_memory<Progress>();
  bool moderate;
  {
    const Progress start = first_progress(arguments);
    const Group group(arguments, start.head, start.group);
    const B backward(arguments, group);
    const bool folds = backward.begin();
    if (threadIdx.x == 0) *now = start, now->folds = folds;
    group.find_rows();
    __syncthreads();
    moderate = backward.begin_window();
  }
  while (now->group < now->end) {
    {
      const Group group(arguments, now->head, now->group);
      B(arguments, group).bring_keys();
    }
    if (__syncthreads_and(moderate) && now->folds) {
      const Group group(arguments, now->head, now->group);
      moderate = B(arguments, group).template run_window<false>();
    } else {
      moderate = run_window_exactly<T>(arguments, now->head, now->group);
    }
    __syncthreads();
    if (threadIdx.x == 0) ++now->group;
    __syncthreads();
  }
  const Group group(arguments, now->head, now->group - 1);
  const B backward(arguments, group);
  backward.write_table();
  backward.write_pads();
}

}  // namespace vidattn::cuda
