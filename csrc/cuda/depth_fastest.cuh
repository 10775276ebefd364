// The backward pass of windows in the depth-fastest order (window3d.cuh), by one block of threads.
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
  static constexpr int kHeights = 2 * kPlaces - 1, kCopyBytes = kHeights * kPairs * kPairBytes;

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

// Whether the row of a window that starts at token `first` is the second one of two.
__device__ __forceinline__ bool is_odd_row(int first) {
  return first / 8 % 2;  // of 7 times the row
}

// What the block knows of two neighbouring queries.
struct PairRecord {
  float minus_delta[4];  // what the products with V start from: of the one, the other, the one, the other
  float log_sum[2];      // log-sum-exp in powers of two
  float unused[2];
};
static_assert(sizeof(PairRecord) * kRowTokens * kPlaces / 2 == DepthFastestPlaces::kPairBytes);

// The scores of a row of queries with a row of keys.
//   folded  the bias and the mask, divided by the scale, are the C operand of the product
//   exact   step by step, as the reference does it
template <bool kExact, bool kMasked, class Group>
struct RowScores {
  static constexpr bool kIsExact = kExact, kIsMasked = kMasked;
  const Group& group;
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
  __device__ __forceinline__ void added(float (&a)[4], uint32_t bias, int query, int key, uint32_t others) const {
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
  __device__ __forceinline__ float2 minus_log_sums(uint32_t pairs, int place) const {
    if constexpr (kExact) return {};
    float2 both = gpu::load_shared<float2>(pairs + place * 4 * sizeof(PairRecord) + offsetof(PairRecord, log_sum));
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

// Where a lane reads and writes for a row of queries and the warp's row of keys: addresses of shared memory.
struct RowAddresses {
  uint32_t keys[2];     // pieces lane / 16 of 16 rows, and the same of two pieces on; values lie a constant further
  uint32_t queries[2];  // the same of queries; the gradients of their context lie a constant further
  uint32_t across[2];   // pieces lane / 8 % 2 of 8 rows and 8 more
  uint32_t scores;
  uint32_t pairs;       // PairRecord
  uint32_t bias, sums;  // for this difference in height: of the bias and of its gradient

  // Goes on to the next row of queries; `first` is the first query of this one.
  __device__ __forceinline__ void advance(int first) {
    const int rows = is_odd_row(first) ? -2 * kRowBytes : 2 * kRowBytes;
    for (uint32_t* at : {&queries[0], &queries[1], &across[0], &across[1]}) *at += rows;
    pairs += kRowTokens / 2 * sizeof(PairRecord), bias += kPairs * kPairBytes, sums += kWidths * kSumBytes;
  }
};

// Sums of dS by difference in width, for places kFirst to kLast of the queries and all of the keys.
template <int kFirst, int kLast>
struct WidthSums {
  static constexpr int kCount = kLast - kFirst + kPlaces;
  float sum[kCount][2];

  __device__ __forceinline__ void load(uint32_t sums) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float2 pair = gpu::load_shared<float2>(sums + (kFirst + i) * kSumBytes);
      sum[i][0] = pair.x, sum[i][1] = pair.y;
    }
  }
  __device__ __forceinline__ void store(uint32_t sums) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      gpu::store_shared(sums + (kFirst + i) * kSumBytes, make_float2(sum[i][0], sum[i][1]));
  }
  __device__ __forceinline__ float (&of(int query, int key))[2] { return sum[query - key + kPlaces - 1 - kFirst]; }
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
  static __device__ __forceinline__ void load_queries(uint32_t (&b)[2][2 * kCount], const RowAddresses& at, int first) {
    for (int part = 0; part < 2; ++part) gpu::ldmatrix(b[part], at.across[part] + first);
  }
  template <int kCount>
  static __device__ __forceinline__ void load_across(uint32_t (&b)[2][2 * kCount], const RowAddresses& at, int first) {
    for (int part = 0; part < 2; ++part)
      gpu::ldmatrix_transposed(b[part], (kCount == 2 ? at.queries[part] : at.across[part]) + first);
  }
  // c = added + keys times place i of the queries.
  template <int kCount>
  static __device__ __forceinline__ void multiply_keys(float (&c)[4], const uint32_t (&keys)[2][4],
                                                       const uint32_t (&b)[2][2 * kCount], int i,
                                                       const float (&added)[4]) {
    gpu::mma_16x8x16<T>(c, keys[0], b[0][2 * i], b[0][2 * i + 1], added);
    gpu::mma_16x8x16<T>(c, keys[1], b[1][2 * i], b[1][2 * i + 1], c);
  }

  // sum += weights of kCount places of queries, times their rows; for the last keys, across.
  template <int kCount>
  static __device__ __forceinline__ void multiply(float (&sum)[4][4], const uint32_t (&weights)[4],
                                                  const uint32_t (&b)[2][2 * kCount]) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint32_t* rows = &b[n / 2][n % 2 * kCount];
      if constexpr (kCount == 2)
        gpu::mma_16x8x16<T>(sum[n], weights, rows[0], rows[1], sum[n]);
      else
        gpu::mma_16x8x8<T>(sum[n], weights[0], weights[1], rows[0], sum[n]);
    }
  }
  template <int kCount>
  static __device__ __forceinline__ void multiply_last(float (&sum)[2][4], const uint32_t (&weights)[4],
                                                       const RowAddresses& at, int first) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t a[2 * kCount];
      gpu::ldmatrix_transposed(a, at.across[part] + first);
      if constexpr (kCount == 2)
        gpu::mma_16x8x16<T>(sum[part], a, weights[0], weights[2], sum[part]);
      else
        gpu::mma_16x8x8<T>(sum[part], a[0], a[1], weights[0], sum[part]);
    }
  }

  template <int first, int kCount, class Scores>
  __device__ __forceinline__ void add_places(const RowAddresses& at, const Scores& row) {
    WidthSums<first, first + kCount - 1> width;
    width.load(at.sums);
    const int start = first * 8 * Layout::kBytes;
    uint32_t q[2][2 * kCount], o[2][2 * kCount], q_across[2][2 * kCount], o_across[2][2 * kCount];
    load_queries<kCount>(q, at, start);
    load_queries<kCount>(o, at, start + kRowBytes);
    if (!Scores::kIsMasked) {
      load_across<kCount>(o_across, at, start + kRowBytes);
      load_across<kCount>(q_across, at, start);
    }
    float2 minus_log_sum[kCount];
    float4 delta[kCount];
    uint32_t others[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      minus_log_sum[i] = row.minus_log_sums(at.pairs, first + i);
      if (!Scores::kIsMasked) delta[i] = gpu::load_shared<float4>(at.pairs + (first + i) * 4 * sizeof(PairRecord));
      others[i] = row.others(first + i);
    }
#pragma unroll
    for (int t = 0; t <= kTiles; ++t) {
      const int halves = t < kTiles ? 2 : 1;
      uint32_t a[2][4], p[4], ds[4];
      float s[2][4], dp[2][4];
      __syncwarp();
      load_keys(a, at, t, 0);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float added[4];
        row.added(added, at.bias, first + i, 2 * t, others[i]);
        multiply_keys<kCount>(s[i], a, q, i, added);
      }
      load_keys(a, at, t, kValuesDistance);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (Scores::kIsMasked) delta[i] = gpu::load_shared<float4>(at.pairs + (first + i) * 4 * sizeof(PairRecord));
        const float minus[4] = {delta[i].x, delta[i].y, delta[i].z, delta[i].w}, none[4] = {};
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
        if (Scores::kIsMasked) {  // for want of registers
          load_across<kCount>(o_across, at, start + kRowBytes);
          load_across<kCount>(q_across, at, start);
        }
        multiply<kCount>(dv[t], p, o_across);
        multiply<kCount>(dk[t], ds, q_across);
      } else {
        multiply_last<kCount>(dv_last, p, at, start + kRowBytes);
        multiply_last<kCount>(dk_last, ds, at, start);
      }
    }
    width.store(at.sums);
  }

  // Adds what a row of queries says about the keys, and leaves dS for the sum over the keys.
  template <class Scores>
  __device__ __forceinline__ void add(const RowAddresses& at, const Scores& row) {
    add_places<0, 2>(at, row);
    add_places<2, 2>(at, row);
    add_places<4, 2>(at, row);
    add_places<6, 1>(at, row);
  }
};

// dq of two places, 16 queries, without the scale: sums over all keys.
// k: the rows of the keys. scores: dS of the first place. second: bytes from there to the other one.
template <class T>
__device__ __forceinline__ void sum_over_keys(float (&dq)[4][4], uint32_t k, uint32_t scores, int second) {
  using Layout = Rows<32>;
  const int lane = int(gpu::keep(threadIdx.x) % 32);
#pragma unroll
  for (int n = 0; n < 4; ++n) dq[n][0] = dq[n][1] = dq[n][2] = dq[n][3] = 0.0f;
  uint32_t ds = scores + (lane % 8 + lane / 16 * 8) * kScoreBytes + lane / 8 % 2 * second;
  const uint32_t first = Layout::place(lane % 16, lane / 16);
  uint32_t halves[2] = {k + first, k + (first ^ 32)};
  uint32_t last = k + 48 * Layout::kBytes + Layout::place(lane % 8, lane / 8);
#pragma unroll 1
  for (int row = 0; row < kPlaces; ++row) {
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

// All rows of tensors are multiples of 16 bytes, at one stride from token to token; a window is 7 tokens high.
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

  __device__ __forceinline__ uint32_t address(int place) const { return gpu::shared_address(at(place)); }
  __device__ __forceinline__ PairRecord* pairs() const { return reinterpret_cast<PairRecord*>(at(Place::kPairs)); }
  __device__ __forceinline__ float* sums() const { return reinterpret_cast<float*>(at(Place::kTable)); }
  // A row of queries; the gradients of their context lie behind it.
  static __device__ __forceinline__ int queries_of(int first) {
    return Place::kQueries + (is_odd_row(first) ? 2 * kRowBytes : 0);
  }
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

  __device__ __forceinline__ void copy_keys() const {
    const PieceOfRows key = group.piece(kK, piece()), value = group.piece(kV, piece());
#pragma unroll 1
    for (int row = 0; row < kPlaces; ++row) {
      const int token = this->token(row * kRowTokens + row_token());
      key.copy(at(kKeysPlace) + row * kRowBytes + piece_place(), token);
      value.copy(at(Place::kValues) + row * kRowBytes + piece_place(), token);
    }
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
    if (piece() < 2) pairs()[n / 2].minus_delta[n % 2 + 2 * piece()] = minus;
  }

  // Returns whether this thread met moderate numbers only. A query that is none has no weights.
  __device__ __forceinline__ bool read_log_sums() const {
    bool moderate = true;
#pragma unroll 1
    for (int n = 32 * warp + lane; n < Place::kTokens; n += 32 * kPlaces) {
      float log_sum = plus_infinity();
      if (const int token = this->token(n); token >= 0) {
        log_sum = *group.lse(token) * kLog2e;
        moderate &= fabsf(log_sum) <= kLargestLogSum;
      }
      pairs()[n / 2].log_sum[n % 2] = log_sum;
    }
    return moderate;
  }

  // Fills what is the same for all windows. Returns whether the block met moderate numbers only.
  __device__ __forceinline__ bool begin() const {
    for (int i = threadIdx.x; i < Place::kTableFloats; i += blockDim.x) sums()[i] = 0.0f;
    if (arguments.pad_gradient)
      for (int i = threadIdx.x; i < plan.warps * 2 * Layout::kDim; i += blockDim.x) this->pad(0)[i] = 0.0f;
    if (threadIdx.x < 64)  // the last warp reads eight keys on, whose products nobody looks at
      *reinterpret_cast<uint4*>(at(threadIdx.x < 32 ? kKeysPlace : Place::kValues) + Place::kTokens * Layout::kBytes +
                                lane * 16) = make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; i < plan.bias_floats; i += blockDim.x)
      reinterpret_cast<float*>(at(Place::kBias))[i] = 0.0f;
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
    const uint32_t sixteen = Layout::place(lane % 16, lane / 16);
    const uint32_t across = Layout::place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const uint32_t keys = address(kKeysPlace) + warp * kRowBytes, queries = address(queries_of(0));
    for (int part = 0; part < 2; ++part) {
      to.keys[part] = keys + (sixteen ^ 32 * part);
      to.queries[part] = queries + (sixteen ^ 32 * part);
      to.across[part] = queries + (across ^ 32 * part);
    }
    to.scores = address(Place::kScores) + (warp * kRowTokens + depth) * kScoreBytes + column * 2;
    to.pairs = address(Place::kPairs) + lane % 4 * sizeof(PairRecord);
    to.bias = address(Place::kBias) + (difference * kPairs + 7 + column - depth) * kPairBytes;
    to.sums = address(Place::kTable) + difference * kWidths * kSumBytes + lane * 8;
    return to;
  }

  template <bool kExact, bool kMasked>
  __device__ __forceinline__ RowScores<kExact, kMasked, Group> scores_of(int first) const {
    const int column = lane % 4 * 2, depth = lane / 4;
    RowScores<kExact, kMasked, Group> scores{group};
    if constexpr (kExact) {
      scores.first_query = first + column, scores.first_key = warp * kRowTokens + depth;
      scores.records = this->records() + scores.first_query;
    } else if constexpr (kMasked) {
      const int height = (group.region(first) ^ group.region(warp * kRowTokens)) & 2;
      for (int i = 0; i < 2; ++i) {
        const bool apart = height || (group.region(column + i) ^ group.region(depth)) & 1;
        scores.mask[i] = apart ? group.mask_added() * group.factor() : 0.0f;
        scores.more[i] = apart ? 0.0f : group.mask_added();
      }
      scores.wide = 0;
      for (int place = 0; place < kPlaces; ++place) scores.wide |= uint32_t(group.region(place * 8) >> 2 & 1) << place;
    }
    return scores;
  }

  // dQ of the queries from `first` on: the first four warps, one on each quarter of a multiprocessor, have two places
  // each.
  __device__ __forceinline__ void write_queries(int first) const {
    if (warp > kPlaces / 2) return;
    float dq[4][4];
    sum_over_keys<T>(dq, address(kKeysPlace), address(Place::kScores) + warp * 32, warp < kPlaces / 2 ? 16 : 0);
    const float scale = group.scale();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (2 * warp + half == kPlaces) break;
      const int token = this->token(first + (2 * warp + half) * 8 + lane / 4);
      if (token < 0) continue;
      uint32_t* to = gradient(kDq, token) + lane % 4;
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (n * 8 < group.head_dim()) to[4 * n] = gpu::pack<T>(dq[n][2 * half] * scale, dq[n][2 * half + 1] * scale);
    }
  }
  __device__ __forceinline__ uint32_t* gradient(Slot slot, int token) const {
    return reinterpret_cast<uint32_t*>(const_cast<char*>(group.plain_row(slot, token)));
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
      if (token >= 0 && piece() * 8 < group.head_dim())
        for (int i = 0; i < 2; ++i)
          reinterpret_cast<uint4*>(gradient(i == 0 ? kDk : kDv, token))[piece()] =
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
    RowAddresses to = again().addresses();
#pragma unroll 1
    while (first_query(to) < Place::kTokens) {
      if (const int next = first_query(to) + kRowTokens; next < Place::kTokens) again().template copy_row<kExact>(next);
      if (!kExact && gpu::load_shared<uint32_t>(address(Place::kMasks)))
        keys.add(to, again().template scores_of<false, true>(first_query(to)));
      else
        keys.add(to, again().template scores_of<kExact, false>(first_query(to)));
      gpu::cp_async_wait<0>();
      if (const int next = first_query(to) + kRowTokens; next < Place::kTokens)
        again().template find_deltas<kExact>(next);
      to.advance(first_query(to));
      __syncthreads();
      again().write_queries(first_query(to) - kRowTokens);
      __syncthreads();
    }
    again().write_keys(keys);
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
      const B backward(arguments, group);
      group.find_rows();
      __syncthreads();
      if (threadIdx.x == 0) *reinterpret_cast<uint32_t*>(backward.at(DepthFastestPlaces::kMasks)) = group.masks();
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
