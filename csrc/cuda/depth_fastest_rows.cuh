// Products of a row of queries with a row of keys, for windows in the depth-fastest order: see depth_fastest.cuh.
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
  static constexpr int kHeights = 2 * kPlaces - 1, kPairOfNoKey = kHeights * kPairs;  // the last pair: see is_key()
  static constexpr int kCopyBytes = (kPairOfNoKey + 1) * kPairBytes;

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
static_assert(sizeof(PairRecord) * kRowTokens * kPlaces / 2 == DepthFastestPlaces::kRecordBytes);

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
  __device__ __forceinline__ void advance(int first, int bias_step) {
    const int rows = is_odd_row(first) ? -2 * kRowBytes : 2 * kRowBytes;
    for (uint32_t* at : {&queries[0], &queries[1], &across[0], &across[1]}) *at += rows;
    pairs += kRowTokens / 2 * sizeof(PairRecord), bias += bias_step, sums += kWidths * kSumBytes;
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
  // The B operands of kCount places of queries: for products with keys, and for those with weights.
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

  // kCount places of the queries, from kFirst on, meet all keys.
  template <int kFirst, int kCount, class Scores>
  __device__ __forceinline__ void add_places(const RowAddresses& at, const Scores& row) {
    WidthSums<kFirst, kFirst + kCount - 1> width;
    width.load(at.sums);
    const int start = kFirst * 8 * Layout::kBytes;
    uint32_t q[2][2 * kCount], o[2][2 * kCount], q_across[2][2 * kCount], o_across[2][2 * kCount];
    load_queries<kCount>(q, at, start);
    load_queries<kCount>(o, at, start + kRowBytes);
    if (!Scores::kIsMasked) {  // there, for want of registers, again for each tile of keys
      load_across<kCount>(o_across, at, start + kRowBytes);
      load_across<kCount>(q_across, at, start);
    }
    float2 minus_log_sum[kCount];
    float4 delta[kCount];
    uint32_t others[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      minus_log_sum[i] = row.minus_log_sums(at.pairs, kFirst + i);
      if (!Scores::kIsMasked) delta[i] = gpu::load_shared<float4>(at.pairs + (kFirst + i) * 4 * sizeof(PairRecord));
      others[i] = row.others(kFirst + i);
    }
#pragma unroll
    for (int t = 0; t <= kTiles; ++t) {
      const int halves = t < kTiles ? 2 : 1;
      uint32_t a[2][4], p[4], ds[4];
      float s[2][4], dp[2][4];
      __syncwarp();  // lest the compiler loads more of the next keys than it has registers for
      load_keys(a, at, t, 0);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float added[4];
        row.added(added, at.bias, kFirst + i, 2 * t, others[i]);
        multiply_keys<kCount>(s[i], a, q, i, added);
      }
      load_keys(a, at, t, kValuesDistance);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (Scores::kIsMasked) delta[i] = gpu::load_shared<float4>(at.pairs + (kFirst + i) * 4 * sizeof(PairRecord));
        const float minus[4] = {delta[i].x, delta[i].y, delta[i].z, delta[i].w}, none[4] = {};
        multiply_keys<kCount>(dp[i], a, o, i, Scores::kIsExact ? none : minus);
        if (Scores::kIsExact)  // where one key has all the weight, the difference has to be 0
          for (int j = 0; j < 4; ++j) dp[i][j] += minus[j];
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int half = 0; half < halves; ++half) {
          float (&sum)[2] = width.of(kFirst + i, 2 * t + half);
          float weight[2], gradient[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float minus = e == 0 ? minus_log_sum[i].x : minus_log_sum[i].y;
            weight[e] = row.weight(s[i][2 * half + e], minus, kFirst + i, e, 2 * t + half);
            gradient[e] = weight[e] * dp[i][2 * half + e];
            sum[e] += gradient[e];
          }
          p[2 * i + half] = gpu::pack<T>(weight[0], weight[1]);
          ds[2 * i + half] = gpu::pack<T>(gradient[0], gradient[1]);
          gpu::store_shared(at.scores + (2 * t + half) * 8 * kScoreBytes + (kFirst + i) * 16, ds[2 * i + half]);
        }
      if (t < kTiles) {
        if (Scores::kIsMasked) {
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

}  // namespace vidattn::cuda
