// The backward pass of windows in the depth-fastest order (window3d.cuh), by one block of threads. Depth, height and
// width may be any axes of the window (BackwardPlan::axes). Where depth is 7, the eighth key has no weight.
//
// A row is what has one height: 7 places of 8 depths, 56 tokens. Each warp owns a row of keys, with dk and dv in
// registers. All warps look at the same row of queries at a time. So the difference in height differs from warp to
// warp, that in width is known to the compiler, and that in depth is the same for a lane in all products: a lane adds
// up the gradient of the bias in registers, 13 differences of width by its two depths, and takes the sums of the row
// to a place that no other thread touches at that time.
#pragma once
#include "backward.cuh"
#include "window3d_gradient.cuh"

namespace vidattn::cuda {

constexpr int kPlaces = 7, kRowTokens = 8 * kPlaces, kRowBytes = 64 * kRowTokens, kWidths = 2 * kPlaces - 1;
constexpr int kValuesDistance = DepthFastestPlaces::kValues - kKeysPlace;
constexpr int kScoreBytes = 2 * kRowTokens;  // of dS of a key with a row of queries: eight lie in different banks
constexpr int kSumBytes = 32 * 8;            // of the sums of the bias of a difference: a lane's two depths
constexpr int kPairs = 14, kPairBytes = 8 * (kWidths + 1);  // see RowBias

// The bias in shared memory. A lane meets two neighbouring depths of queries and one of keys, so there is a pair of
// entries for each of 14 differences of depth, query minus key; and it meets two neighbouring places of keys, so the
// pairs of differences of width lie side by side, in falling order, and there is a copy that starts one pair later.
// Both pairs are then one aligned read of 16 bytes, which is the C operand of the product as it is.
struct RowBias {
  static constexpr int kHeights = 2 * kPlaces - 1, kPairOfNoKey = kHeights * kPairs;
  static constexpr int kCopyBytes =
      (kPairOfNoKey + 1) * kPairBytes;  // the last pair: of keys that only fill up an eight

  // Adds an entry for a difference query minus key.
  static __device__ __forceinline__ void store(unsigned char* bias, int depth, int height, int width, float value) {
    if (abs(depth) > 7 || abs(height) >= kPlaces || abs(width) >= kPlaces) return;
    for (int half = 0; half < 2; ++half) {
      const int pair = depth + 7 - half;
      if (pair < 0 || pair >= kPairs) continue;
      unsigned char* at = bias + ((height + kPlaces - 1) * kPairs + pair) * kPairBytes + (kPlaces - 1 - width) * 8;
      reinterpret_cast<float*>(at)[half] = value;
      reinterpret_cast<float*>(at + kCopyBytes + 8)[half] = value;
    }
  }
};

// The scores of a row of queries with a row of keys.
//   folded  the bias and the mask, divided by the scale, are the C operand of the product
//   exact   step by step, as the reference does it
template <bool kExact, bool kMasked, class Group>
struct RowScores {
  static constexpr bool kIsExact = kExact;
  const Group& group;
  uint32_t bias;      // address: of this lane, for this difference in height
  uint32_t log_sums;  // address: of this lane's first query of place 0
  // Exact:
  const QueryRecord* records;  // from this lane's first query of place 0 on
  int first_query, first_key;  // numbers of this lane's
  // Masked; of the lane's two queries, whose regions may differ from that of its key in depth or height:
  float mask[2];  // then in powers of two, else 0
  float more[2];  // then 0, as it counts once, else what a difference in width adds
  uint32_t wide;  // bit per place: its region in width

  // Masked: bit per place of keys, whether it is of another region in width than a place of queries.
  __device__ __forceinline__ uint32_t others(int query) const {
    return kMasked ? gpu::keep(wide ^ (0u - (wide >> query & 1))) : 0;
  }

  // Of two queries of a place with a key of this place and one of the next one.
  __device__ __forceinline__ void added(float (&a)[4], int query, int key, uint32_t others) const {
    if constexpr (kExact) {
      a[0] = a[1] = a[2] = a[3] = 0.0f;
    } else {
      const int slot = kPlaces - 1 - query + key;
      const float4 quad = gpu::load_shared<float4>(bias + (slot % 2 ? RowBias::kCopyBytes + (slot + 1) * 8 : slot * 8));
      a[0] = quad.x, a[1] = quad.y, a[2] = quad.z, a[3] = quad.w;
      if constexpr (kMasked)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (others >> (key + i / 2) & 1) a[i] += more[i % 2];
    }
  }

  // Minus the log-sum-exp of the lane's two queries of a place, in powers of two.
  __device__ __forceinline__ float2 minus_log_sums(int place) const {
    if constexpr (kExact) return {};
    float2 both = gpu::load_shared<float2>(log_sums + place * 8 * 4);
    both.x = kMasked ? mask[0] - both.x : -both.x, both.y = kMasked ? mask[1] - both.y : -both.y;
    return both;
  }

  // place, which: of the query.
  __device__ __forceinline__ float weight(float product, float minus_log_sum, int place, int which, int key) const {
    if constexpr (kExact) {
      const int n = place * 8 + which;
      const float score = group.exact(product, first_query + n, first_key + key * 8);
      return gpu::exp2_approx((score - records[n].largest) * kLog2e - records[n].log_sum);
    } else {
      return gpu::exp2_approx(fmaf(product, group.factor(), minus_log_sum));
    }
  }
};

// Where a lane reads and writes for a row of queries and a row of keys: addresses of shared memory.
struct RowAddresses {
  uint32_t keys[2];     // pieces lane / 16 of 16 rows, and the same of two pieces on; values lie a constant further
  uint32_t queries[2];  // the same of queries; the gradients of their context lie a constant further
  uint32_t across[2];   // pieces lane / 8 % 2 of 8 rows and 8 more
  uint32_t last;        // pieces lane / 8 of 8 rows: of the last place of the queries
  uint32_t scores, deltas;
  uint32_t sums;  // of the bias; 0 if nobody wants them
};

// Sums of dS by difference in width, for places kFirst to kLast of the queries and all of the keys.
template <int kFirst, int kLast>
struct WidthSums {
  static constexpr int kCount = kLast - kFirst + kPlaces;
  float sum[kCount][2];

  __device__ __forceinline__ WidthSums() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i][0] = sum[i][1] = 0.0f;
  }
  __device__ __forceinline__ float (&of(int query, int key))[2] { return sum[query - key + kPlaces - 1 - kFirst]; }

  // Adds them to sums of a lane, where there are such.
  __device__ __forceinline__ void store(uint32_t sums) const {
    if (!sums) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t at = sums + (kFirst + i) * kSumBytes;
      const float2 before = gpu::load_shared<float2>(at);
      gpu::store_shared(at, make_float2(before.x + sum[i][0], before.y + sum[i][1]));
    }
  }
};

// A row of keys: what a warp has of them. Three times 16 keys, and the last 8, whose gradients stand across: a column
// is a key.
template <class T>
struct DepthFastestKeys {
  using Layout = Rows<32>;
  static constexpr int kTiles = 3;
  float dk[kTiles][4][4], dv[kTiles][4][4];
  float dk_last[2][4], dv_last[2][4];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) dk[t][n][i] = dv[t][n][i] = 0.0f;
        if (n < 2) dk_last[n][i] = dv_last[n][i] = 0.0f;
      }
  }

  // The A operand of 16 keys.
  static __device__ __forceinline__ void load_keys(uint32_t (&a)[2][4], const RowAddresses& at, int t, int distance) {
    gpu::ldmatrix(a[0], at.keys[0] + distance + t * 16 * Layout::kBytes);
    gpu::ldmatrix(a[1], at.keys[1] + distance + t * 16 * Layout::kBytes);
  }
  // The B operands of kCount places of queries: for products with keys, and with weights.
  template <int kCount>
  static __device__ __forceinline__ void load_queries(uint32_t (&b)[2][4], uint32_t (&b_across)[2][4],
                                                      const RowAddresses& at, int first) {
    if (kCount == 1) {
      gpu::ldmatrix(b[0], at.last + first);
      gpu::ldmatrix_transposed(b_across[0], at.last + first);
    } else {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        gpu::ldmatrix(b[part], at.across[part] + first);
        gpu::ldmatrix_transposed(b_across[part], at.queries[part] + first);
      }
    }
  }
  // c = added + keys times place i of the queries.
  template <int kCount>
  static __device__ __forceinline__ void multiply_keys(float (&c)[4], const uint32_t (&keys)[2][4],
                                                       const uint32_t (&b)[2][4], int i, const float (&added)[4]) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint32_t (&pair)[4] = b[kCount == 1 ? 0 : part];
      const int low = kCount == 1 ? 2 * part : 2 * i;
      const float (&before)[4] = c;
      gpu::mma_16x8x16<T>(c, keys[part], pair[low], pair[low + 1], part == 0 ? added : before);
    }
  }

  // sum += weights of kCount places of queries, times their rows; for the last keys, across.
  template <int kCount>
  static __device__ __forceinline__ void multiply(float (&sum)[4][4], const uint32_t (&weights)[4],
                                                  const uint32_t (&b)[2][4]) {
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (kCount == 2)
        gpu::mma_16x8x16<T>(sum[n], weights, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1], sum[n]);
      else
        gpu::mma_16x8x8<T>(sum[n], weights[0], weights[1], b[0][n], sum[n]);
  }
  template <int kCount>
  static __device__ __forceinline__ void multiply_last(float (&sum)[2][4], const uint32_t (&weights)[4],
                                                       const RowAddresses& at, int first) {
    uint32_t a[4];
    if (kCount == 1) gpu::ldmatrix_transposed(a, at.last + first);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (kCount == 2) {
        gpu::ldmatrix_transposed(a, at.across[part] + first);
        gpu::mma_16x8x16<T>(sum[part], a, weights[0], weights[2], sum[part]);
      } else {
        gpu::mma_16x8x8<T>(sum[part], a[2 * part], a[2 * part + 1], weights[0], sum[part]);
      }
    }
  }

  template <int kCount, class Scores, class Widths>
  __device__ __forceinline__ void add_places(const RowAddresses& at, const Scores& row, int first, Widths& width) {
    const int start = kCount == 1 ? 0 : first * 8 * Layout::kBytes;
    uint32_t q[2][4], o[2][4], q_across[2][4], o_across[2][4];
    load_queries<kCount>(q, q_across, at, start);
    load_queries<kCount>(o, o_across, at, start + kRowBytes);
    float2 minus_log_sum[kCount];
    uint32_t others[kCount];
    float minus_delta[kCount][4];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      minus_log_sum[i] = row.minus_log_sums(first + i);
      others[i] = row.others(first + i);
      const float4 delta = gpu::load_shared<float4>(at.deltas + (first + i) * 8 * 8);
      minus_delta[i][0] = delta.x, minus_delta[i][1] = delta.y;
      minus_delta[i][2] = delta.z, minus_delta[i][3] = delta.w;
    }
#pragma unroll
    for (int t = 0; t <= kTiles; ++t) {
      const int halves = t < kTiles ? 2 : 1;
      uint32_t a[2][4], p[4], ds[4];
      float s[2][4], dp[2][4];
      load_keys(a, at, t, 0);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float added[4];
        row.added(added, first + i, 2 * t, others[i]);
        multiply_keys<kCount>(s[i], a, q, i, added);
      }
      load_keys(a, at, t, kValuesDistance);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float none[4] = {}, (&minus)[4] = minus_delta[i];
        multiply_keys<kCount>(dp[i], a, o, i, Scores::kIsExact ? none : minus);
        if (Scores::kIsExact)  // where one key has all the weight, the difference has to be 0
          for (int j = 0; j < 4; ++j) dp[i][j] += minus[j];
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int half = 0; half < halves; ++half) {
          float (&sum)[2] = width.of(first + i, 2 * t + half);
          float weight[2], gradient[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float minus = e == 0 ? minus_log_sum[i].x : minus_log_sum[i].y;
            weight[e] = row.weight(s[i][2 * half + e], minus, first + i, e, 2 * t + half);
            gradient[e] = weight[e] * dp[i][2 * half + e];
            sum[e] += gradient[e];
          }
          p[2 * i + half] = gpu::pack<T>(weight[0], weight[1]);
          ds[2 * i + half] = gpu::pack<T>(gradient[0], gradient[1]);
          gpu::store_shared(at.scores + (2 * t + half) * 8 * kScoreBytes + (first + i) * 16, ds[2 * i + half]);
        }
      if (t < kTiles) {
        multiply<kCount>(dv[t], p, o_across);
        multiply<kCount>(dk[t], ds, q_across);
      } else {
        multiply_last<kCount>(dv_last, p, at, start + kRowBytes);
        multiply_last<kCount>(dk_last, ds, at, start);
      }
    }
  }

  // Adds what a row of queries says about the keys, and leaves dS for the sum over the keys.
  template <class Scores>
  __device__ __forceinline__ void add(const RowAddresses& at, const Scores& row) {
    {
      WidthSums<0, 3> width;
      add_places<2>(at, row, 0, width);
      add_places<2>(at, row, 2, width);
      width.store(at.sums);
    }
    {
      WidthSums<4, 6> width;
      add_places<2>(at, row, 4, width);
      add_places<1>(at, row, 6, width);
      width.store(at.sums);
    }
  }
};

// dq of two places, 16 queries, without the scale: sums over `rows` rows of keys.
// k: the rows of the keys. scores: dS of the first place. second: bytes from there to the other one.
template <class T>
__device__ __forceinline__ void sum_over_keys(float (&dq)[4][4], uint32_t k, uint32_t scores, int second, int rows) {
  using Layout = Rows<32>;
  const int lane = int(gpu::keep(threadIdx.x) % 32);
#pragma unroll
  for (int n = 0; n < 4; ++n) dq[n][0] = dq[n][1] = dq[n][2] = dq[n][3] = 0.0f;
  uint32_t ds = scores + (lane % 8 + lane / 16 * 8) * kScoreBytes + lane / 8 % 2 * second;
  const uint32_t first = Layout::place(lane % 16, lane / 16);
  uint32_t halves[2] = {k + first, k + (first ^ 32)};
  uint32_t last = k + 48 * Layout::kBytes + Layout::place(lane % 8, lane / 8);
#pragma unroll 1
  for (; rows > 0; --rows) {
    uint32_t a[4], b[4], two[2];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      gpu::ldmatrix_transposed(a, ds + i * 16 * kScoreBytes);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        gpu::ldmatrix_transposed(b, halves[m] + i * 16 * Layout::kBytes);
        gpu::mma_16x8x16<T>(dq[2 * m], a, b[0], b[1], dq[2 * m]);
        gpu::mma_16x8x16<T>(dq[2 * m + 1], a, b[2], b[3], dq[2 * m + 1]);
      }
    }
    gpu::ldmatrix_transposed(two, ds + 48 * kScoreBytes);
    gpu::ldmatrix_transposed(b, last);
#pragma unroll
    for (int n = 0; n < 4; ++n) gpu::mma_16x8x8<T>(dq[n], two[0], two[1], b[n], dq[n]);
    ds += kRowTokens * kScoreBytes, halves[0] += kRowBytes, halves[1] += kRowBytes, last += kRowBytes;
  }
}

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

  __device__ DepthFastestBackward(const WindowGradientArguments& given, const Group& of)
      : Base(given, of, int(threadIdx.x)) {}
  __device__ DepthFastestBackward(const WindowGradientArguments& given, const Group& of, int thread)
      : Base(given, of, thread) {}

  __device__ __forceinline__ uint32_t address(int place) const { return gpu::shared_address(at(place)); }
  __device__ __forceinline__ int rows() const { return int(arguments.call.window[1]); }
  // A row of queries; the gradients of their context lie behind it.
  static __device__ __forceinline__ int queries_of(int row) { return Place::kQueries + row % 2 * 2 * kRowBytes; }
  // Of two neighbouring queries of a row: what the products with V start from, twice.
  static __device__ __forceinline__ int minus_deltas(int row) { return Place::kDeltas + row % 2 * kRowTokens * 8; }
  __device__ __forceinline__ float* sums() const { return reinterpret_cast<float*>(at(Place::kTable)); }

  // ---- Rows of tokens ----

  // Negative for padding.
  __device__ __forceinline__ int token(int n) const { return reinterpret_cast<const int*>(at(Place::kTables))[n]; }
  __device__ __forceinline__ char* row_of(Slot slot, int token) const {
    const int64_t first = reinterpret_cast<const int64_t*>(at(kBasesPlace))[slot];
    return arguments.call.tensor[slot].data +
           (first + int64_t(uint64_t(uint32_t(token)) * arguments.token_stride[slot]));
  }

  // A thread copies one piece of a row of tokens.
  __device__ __forceinline__ int piece() const { return lane % Layout::kPieces; }
  __device__ __forceinline__ int row_token() const { return warp * 8 + lane / Layout::kPieces; }
  __device__ __forceinline__ uint32_t piece_place() const { return Layout::place(row_token(), piece()); }
  __device__ __forceinline__ bool has_piece() const { return piece() * 8 < group.head_dim(); }

  __device__ __forceinline__ void copy_keys() const {
    const char* pads[2] = {};
    if (arguments.call.pad_qkv)
      for (int i = 0; i < 2; ++i)
        pads[i] = arguments.call.pad_qkv + ((kK + i) * arguments.call.heads + group.head()) * group.head_dim() * 2;
#pragma unroll 1
    for (int row = 0; row < rows(); ++row) {
      const int token = this->token(row * kRowTokens + row_token());
      const uint32_t to = row * kRowBytes + piece_place();
      const bool valid = has_piece() && token >= (pads[0] ? kPadding : 0);
      for (int i = 0; i < 2; ++i) {
        const Slot slot = i == 0 ? kK : kV;
        const char* from = valid && token < 0 ? pads[i] : row_of(slot, max(token, 0));
        gpu::cp_async_16(address(i == 0 ? kKeysPlace : Place::kValues) + to, from + (valid ? 16 * piece() : 0), valid);
      }
    }
  }

  // Of queries, with the gradients of their context and, to find delta, the context.
  template <bool kExact>
  __device__ __forceinline__ void copy_row(int row) const {
    const int token = this->token(row * kRowTokens + row_token());
    const bool valid = has_piece() && token >= 0;
    const int from = max(token, 0), start = valid ? 16 * piece() : 0;
    const uint32_t to = address(queries_of(row)) + piece_place();
    gpu::cp_async_16(to, row_of(kQ, from) + start, valid);
    gpu::cp_async_16(to + kRowBytes, row_of(kDout, from) + start, valid);
    if (!kExact) gpu::cp_async_16(address(Place::kContext) + piece_place(), row_of(kOut, from) + start, valid);
    gpu::cp_async_commit();
  }

  // From what this thread has copied, which has arrived. Exact: of the record of the query.
  template <bool kExact>
  __device__ __forceinline__ void find_deltas(int row) const {
    float minus;
    if constexpr (kExact) {
      minus = this->records()[row * kRowTokens + row_token()].minus_delta;
    } else {
      const uint4 words[2] = {gpu::load_shared<uint4>(address(queries_of(row) + kRowBytes) + piece_place()),
                              gpu::load_shared<uint4>(address(Place::kContext) + piece_place())};
      const T *x = reinterpret_cast<const T*>(&words[0]), *y = reinterpret_cast<const T*>(&words[1]);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(to_float(x[i]), to_float(y[i]), sum);
      minus = -this->sum_of_quad(sum);
    }
    if (piece() < 2)
      reinterpret_cast<float*>(at(minus_deltas(row)))[row_token() / 2 * 4 + row_token() % 2 + piece() * 2] = minus;
  }

  // Returns whether this thread met moderate numbers only. A query that is none has no weights.
  __device__ __forceinline__ bool read_log_sums() const {
    bool moderate = true;
#pragma unroll 1
    for (int n = threadIdx.x; n < group.keys(); n += 32 * kPlaces) {
      float log_sum = plus_infinity();
      if (const int token = group.token(n); token >= 0) {
        log_sum = *group.lse(token) * kLog2e;
        moderate &= fabsf(log_sum) <= kLargestLogSum;
      }
      reinterpret_cast<float*>(at(Place::kLogSums))[n] = log_sum;
    }
    return moderate;
  }

  // Fills what is the same for all windows. Returns whether the block met moderate numbers only.
  __device__ __forceinline__ bool begin() const {
    for (int i = threadIdx.x; i < plan.table_floats; i += blockDim.x) sums()[i] = 0.0f;
    if (arguments.pad_gradient)
      for (int i = threadIdx.x; i < plan.warps * 2 * Layout::kDim; i += blockDim.x) this->pad(0)[i] = 0.0f;
    if (threadIdx.x < 64)  // the last warp reads eight keys on, whose products nobody looks at
      *reinterpret_cast<uint4*>(at(threadIdx.x < 32 ? kKeysPlace : Place::kValues) + group.keys() * Layout::kBytes +
                                lane * 16) = make_uint4(0, 0, 0, 0);
    constexpr int kCopy = RowBias::kCopyBytes / 4, kHidden = RowBias::kPairOfNoKey * kPairBytes / 4;
    for (int i = threadIdx.x; i < plan.bias_floats; i += blockDim.x)
      reinterpret_cast<float*>(at(Place::kBias))[i] = i % kCopy < kHidden ? 0.0f : kNoWeight;
    __syncthreads();
    const bool moderate = group.for_each_bias([&](int depth, int height, int width, float value) {
      RowBias::store(at(Place::kBias), depth, height, width, value);
    });
    return __syncthreads_and(moderate && arguments.folds);
  }

  // Where this lane reads and writes, for a row of queries with the keys of the warp.
  __device__ __forceinline__ RowAddresses addresses(int row, int difference) const {
    RowAddresses to;
    const uint32_t sixteen = Layout::place(lane % 16, lane / 16);
    const uint32_t across = Layout::place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const uint32_t keys = address(kKeysPlace) + warp * kRowBytes, queries = address(queries_of(row));
    for (int part = 0; part < 2; ++part) {
      to.keys[part] = keys + (sixteen ^ 32 * part);
      to.queries[part] = queries + (sixteen ^ 32 * part);
      to.across[part] = queries + (across ^ 32 * part);
    }
    to.last = queries + (kPlaces - 1) * 8 * Layout::kBytes + Layout::place(lane % 8, lane / 8);
    to.scores = address(Place::kScores) + (warp * kRowTokens + lane / 4) * kScoreBytes + lane % 4 * 4;
    to.deltas = address(minus_deltas(row)) + lane % 4 * 16;
    to.sums = plan.table_floats ? address(Place::kTable) + difference * kWidths * kSumBytes + lane * 8 : 0;
    return to;
  }

  template <bool kExact, bool kMasked>
  __device__ __forceinline__ void meet(DepthFastestKeys<T>& keys, int row) const {
    const int column = lane % 4 * 2, depth = lane / 4, difference = row - warp + kPlaces - 1;
    RowScores<kExact, kMasked, Group> scores{group};
    if constexpr (kExact) {
      scores.first_query = row * kRowTokens + column, scores.first_key = warp * kRowTokens + depth;
      scores.records = this->records() + scores.first_query;
    } else {
      const int pair = group.is_key(depth) ? difference * kPairs + 7 + column - depth : RowBias::kPairOfNoKey;
      scores.bias = address(Place::kBias) + pair * kPairBytes;
      scores.log_sums = address(Place::kLogSums) + (row * kRowTokens + column) * 4;
      if constexpr (kMasked) {
        const int height = (group.region(row * kRowTokens) ^ group.region(warp * kRowTokens)) & 2;
        for (int i = 0; i < 2; ++i) {
          const bool apart = height || (group.region(column + i) ^ group.region(depth)) & 1;
          scores.mask[i] = apart ? group.mask_added() * group.factor() : 0.0f;
          scores.more[i] = apart ? 0.0f : group.mask_added();
        }
        scores.wide = 0;
        for (int place = 0; place < kPlaces; ++place)
          scores.wide |= uint32_t(group.region(place * 8) >> 2 & 1) << place;
      }
    }
    keys.add(addresses(row, difference), scores);
  }

  // dQ of a row of queries: the first four warps, one on each quarter of a multiprocessor, have two places each.
  __device__ __forceinline__ void write_queries(int row) const {
    if (warp > kPlaces / 2) return;
    float dq[4][4];
    sum_over_keys<T>(dq, address(kKeysPlace), address(Place::kScores) + warp * 32, warp < kPlaces / 2 ? 16 : 0, rows());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (2 * warp + half == kPlaces) break;
      const int token = this->token(row * kRowTokens + (2 * warp + half) * 8 + lane / 4);
      if (token < 0) continue;
      uint32_t* to = reinterpret_cast<uint32_t*>(row_of(kDq, token)) + lane % 4;
      const float scale = group.scale();
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (n * 8 < group.head_dim()) to[4 * n] = gpu::pack<T>(dq[n][2 * half] * scale, dq[n][2 * half + 1] * scale);
    }
  }

  // Puts dK or dV of the warp's keys, times `scale`, into the shared memory where their rows were.
  __device__ __forceinline__ void put_keys(int place_of_rows, float (&sum)[3][4][4], float (&last)[2][4],
                                           float scale) const {
    const uint32_t rows = address(place_of_rows) + warp * kRowBytes + lane % 4 * 4;
#pragma unroll
    for (int place = 0; place < kPlaces; ++place)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float* pair = place + 1 < kPlaces ? &sum[place / 2][n][place % 2 * 2] : &last[n / 2][n % 2 * 2];
        pair[0] *= scale, pair[1] *= scale;
        uint32_t packed = gpu::pack<T>(pair[0], pair[1]);
        if (place + 1 == kPlaces) packed = gpu::transpose(packed);
        gpu::store_shared(rows + Layout::place(place * 8 + lane / 4, n), packed);
      }
  }
  __device__ __forceinline__ void write_keys(DepthFastestKeys<T>& keys) const {
    put_keys(kKeysPlace, keys.dk, keys.dk_last, group.scale());
    put_keys(Place::kValues, keys.dv, keys.dv_last, 1.0f);
    __syncwarp();
    bool padded = false;
#pragma unroll
    for (int place = 0; place < kPlaces; ++place) {
      const int n = warp * kRowTokens + place * 8 + lane / Layout::kPieces, token = this->token(n);
      padded |= token < 0;
      if (token >= 0 && has_piece())
        for (int i = 0; i < 2; ++i)
          reinterpret_cast<uint4*>(row_of(i == 0 ? kDk : kDv, token))[piece()] =
              gpu::load_shared<uint4>(address(i == 0 ? kKeysPlace : Place::kValues) + Layout::place(n, piece()));
    }
    if (!arguments.pad_gradient || !__any_sync(~0u, padded)) return;
    add_padding(kDk, keys.dk, keys.dk_last);
    add_padding(kDv, keys.dv, keys.dv_last);
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
          total += group.is_real(start + place * 8 + lane / 4) ? 0.0f : sum[place / 2][n][place % 2 * 2 + j];
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
        total += group.is_real(start + (kPlaces - 1) * 8 + column + j) ? 0.0f : last[n / 2][n % 2 * 2 + j];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (lane % 4 == 0) to[n * 8 + lane / 4] += total;
    }
    __syncwarp();
  }

  // All queries of a window meet its keys, which are on their way to shared memory.
  template <bool kExact>
  __device__ __forceinline__ void run_window() const {
    gpu::cp_async_wait<0>();
    find_deltas<kExact>(0);
    __syncthreads();
    DepthFastestKeys<T> keys;
    keys.reset();
#pragma unroll 1
    for (int row = 0; row < rows(); ++row) {
      if (row + 1 < rows()) again().template copy_row<kExact>(row + 1);
      if (warp < rows()) {
        if (!kExact && group.masks())
          meet<kExact, true>(keys, row);
        else
          meet<kExact, false>(keys, row);
      }
      gpu::cp_async_wait<0>();
      if (row + 1 < rows()) again().template find_deltas<kExact>(row + 1);
      __syncthreads();
      again().write_queries(row);
      __syncthreads();
    }
    if (warp < rows()) again().write_keys(keys);
  }
  // The same; what follows from the thread's number is found again and not kept, as the registers are needed.
  __device__ __forceinline__ DepthFastestBackward again() const {
    return DepthFastestBackward(arguments, group, int(gpu::keep(threadIdx.x) & 255));
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
__device__ __attribute__((noinline)) void run_window_exactly(const WindowGradientArguments& arguments, int head,
                                                             int g) {
  const WindowGradientGroup<true> group(arguments, head, g);
  const DepthFastestBackward<T> backward(arguments, group);
  backward.scan_rows();
  __syncthreads();
  backward.template run_window<true>();
}

template <class T>
__device__ __forceinline__ void depth_fastest_backward(const WindowGradientArguments& arguments) {
  using B = DepthFastestBackward<T>;
  using Group = WindowGradientGroup<true>;
  Progress* const now = gpu::shared_memory<Progress>();
  {
    const Progress start = first_progress(arguments);
    const Group group(arguments, start.head, start.group);
    const bool folds = B(arguments, group).begin();
    if (threadIdx.x == 0) *now = start, now->folds = folds;
  }
  __syncthreads();
  while (now->group < now->end) {
    bool moderate;
    {
      Group group(arguments, now->head, now->group);
      const B backward(arguments, group, gpu::keep(threadIdx.x));
      group.find_rows();
      __syncthreads();
      backward.copy_keys();
      backward.template copy_row<false>(0);
      moderate = __syncthreads_and(backward.read_log_sums());
    }
    if (moderate && now->folds) {
      const Group group(arguments, now->head, now->group);
      B(arguments, group).template run_window<false>();
    } else {
      run_window_exactly<T>(arguments, now->head, now->group);
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
