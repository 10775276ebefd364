// Products of a row of queries with a row of keys, for windows in the depth-fastest order: see depth_fastest.cuh.
#pragma once
#include "backward.cuh"
#include "window3d_gradient.cuh"

namespace vidattn::cuda {

constexpr int kPlaces = 7, kRowTokens = 8 * kPlaces, kRowBytes = 64 * kRowTokens, kWidths = 2 * kPlaces - 1;
constexpr int kValuesDistance = DepthFastestPlaces::kValues - kKeysPlace;
constexpr int kScoreBytes = 2 * kRowTokens;  // of dS of a key with a row of queries: eight lie in different banks
constexpr int kScoresDistance = DepthFastestPlaces::kScoreBytes;  // from a row of queries to the next one
constexpr int kSumBytes = 32 * 8;                      // of the sums of the bias of a difference: a lane's two depths
constexpr int kPairs = 14, kPairBytes = 16 * kWidths;  // see RowBias

// The bias in shared memory. A lane meets two neighbouring depths of queries and one of keys, so there is a pair of
// entries for each of 14 differences of depth, query minus key; and it meets two neighbouring places of keys, so each
// pair has that of the next difference of width behind it, in falling order. Both are then one read of 16 bytes, which
// is the C operand of the product as it is. The last pair is for a key that is none: see is_key().
struct RowBias {
  static constexpr int kHeights = 2 * kPlaces - 1, kPairOfNoKey = kHeights * kPairs;

  // Adds an entry for a difference query minus key.
  static __device__ __forceinline__ void store(unsigned char* bias, int depth, int height, int width, float value) {
    if (abs(depth) > 7 || abs(height) >= kPlaces || abs(width) >= kPlaces) return;
    for (int half = 0; half < 2; ++half)
      for (int before = 0; before < 2; ++before) {
        const int pair = depth + 7 - half, at = kPlaces - 1 - width - before;
        if (pair < 0 || pair >= kPairs || at < 0) continue;
        float* pairs = reinterpret_cast<float*>(bias + ((height + kPlaces - 1) * kPairs + pair) * kPairBytes + at * 16);
        pairs[2 * before + half] = value;
      }
  }
};

// Whether the row of a window that starts at token `first` is the second one of two.
__device__ __forceinline__ bool is_odd_row(int first) {
  return first / 8 % 2;  // of 7 times the row
}

// What the block knows of two neighbouring queries.
struct PairRecord {
  float minus_delta[2];
  float minus_log_sum[2];  // log-sum-exp in powers of two
};
static_assert(sizeof(PairRecord) * kRowTokens * kPlaces / 2 == DepthFastestPlaces::kRecordBytes);

// The scores of a row of queries with a row of keys.
//   folded  the bias and the mask, divided by the scale, are the C operand of the product
//   exact   step by step, as the reference does it
template <bool kExact, bool kMasked, class Group>
struct RowScores {
  static constexpr bool kIsExact = kExact;
  const Group& group;
  // Exact:
  const QueryRecord* records;  // from this lane's first query of place 0 on
  int first_query, first_key;  // numbers of this lane's
  uint32_t keys;               // where the warp's rows of keys lie
  // Masked; of the lane's two queries, what a difference in width adds: 0 if they differ from its key in depth or
  // height, as the mask counts once.
  float more[2];
  uint32_t wide;  // bit per place: its region in width

  // Masked: bit per place of keys, whether it is of another region in width than a place of queries.
  __device__ __forceinline__ uint32_t others(int query) const {
    return kMasked ? gpu::keep(wide ^ (0u - (wide >> query & 1))) : 0;
  }

  // Of two queries with a key of this place and one of the next one, whose bias lies there.
  __device__ __forceinline__ void added(float (&a)[4], uint32_t bias, int key, uint32_t others) const {
    if constexpr (kExact) {
      a[0] = a[1] = a[2] = a[3] = 0.0f;
    } else {
      const float4 quad = gpu::load_shared<float4>(bias);
      a[0] = quad.x, a[1] = quad.y, a[2] = quad.z, a[3] = quad.w;
      if constexpr (kMasked)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (others >> (key + i / 2) & 1) a[i] += more[i % 2];
    }
  }

  // Of a query of this lane: what is added to the score in powers of two.
  __device__ __forceinline__ float minus_log_sum(float minus, int which) const {
    return kMasked && more[which] == 0.0f ? minus + group.mask_added() * group.factor() : minus;
  }

  // query: as a distance from this lane's first one.
  __device__ __forceinline__ float weight(float product, float minus_log_sum, int query, int key) const {
    if constexpr (kExact) {
      const float score = group.exact(product, first_query + query, first_key + key * 8);
      return gpu::exp2_approx((score - records[query].largest) * kLog2e - records[query].log_sum);
    } else {
      return gpu::exp2_approx(fmaf(product, group.factor(), minus_log_sum));
    }
  }
};

// Where a lane reads and writes for a place of queries and the warp's row of keys: addresses of shared memory.
struct RowAddresses {
  uint32_t queries;  // pieces lane / 8 of 8 rows; the gradients of their context lie a constant further
  uint32_t scores;
  uint32_t pairs;  // PairRecord
  uint32_t bias,
      sums;  // for this difference in height: of the bias with the first key, and of the gradient of the last

  // Go on to the next place of the row, and from the end of a row to the next one.
  __device__ __forceinline__ void next_place(int places = 1) {
    queries += places * 8 * Rows<32>::kBytes, scores += places * 16, pairs += places * 4 * sizeof(PairRecord);
    bias -= places * 16, sums += places * kSumBytes;
    for (uint32_t* at : {&queries, &scores, &pairs, &bias, &sums}) *at = gpu::keep(*at);  // lest starts are kept too
  }
  __device__ __forceinline__ void next_row(bool was_odd, int bias_step, int scores_step) {
    queries += was_odd ? -3 * kRowBytes : kRowBytes;
    scores += (was_odd ? -scores_step : scores_step) - kPlaces * 16;
    bias += kPlaces * 16 + bias_step, sums += (kWidths - kPlaces) * kSumBytes;
  }
};

// Sums of dS by difference in width: the seven that a place of queries meets. From place to place, one goes and another
// one comes.
struct WidthSums {
  float sum[kPlaces][2];  // of the last key first

  __device__ __forceinline__ void load(uint32_t sums, int i) {
    const float2 pair = gpu::load_shared<float2>(sums + i * kSumBytes);
    sum[i][0] = pair.x, sum[i][1] = pair.y;
  }
  __device__ __forceinline__ void store(uint32_t sums, int i) const {
    gpu::store_shared(sums + i * kSumBytes, make_float2(sum[i][0], sum[i][1]));
  }
  __device__ __forceinline__ void shift() {
#pragma unroll
    for (int i = 0; i + 1 < kPlaces; ++i) sum[i][0] = sum[i + 1][0], sum[i][1] = sum[i + 1][1];
  }
  __device__ __forceinline__ float (&of(int key))[2] { return sum[kPlaces - 1 - key]; }
};

// A row of keys: what a warp has of them, in registers as long as the window lasts. Three times 16 keys, and the last
// 8, whose gradients stand across: a column is a key.
template <class T>
struct DepthFastestKeys {
  using Layout = Rows<32>;
  static constexpr int kTiles = 3;
  // A operands of 16 keys and of their values. That of the last 8 keys, k[kTiles], has their values as rows 8 to 15: so
  // it does for both products, each of which has one half that nobody looks at.
  uint32_t k[kTiles + 1][2][4], v[kTiles][2][4];
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
  // `keys` is where the warp's rows lie.
  __device__ __forceinline__ void load(int t, uint32_t keys) {
    const int lane = int(gpu::keep(threadIdx.x) % 32);
    const uint32_t rows = t < kTiles ? lane % 16 : lane % 8, last = lane / 8 % 2 * kValuesDistance;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint32_t at = keys + t * 16 * Layout::kBytes + (Layout::place(rows, lane / 16) ^ 32 * part);
      gpu::ldmatrix(k[t][part], t < kTiles ? at : at + last);
      if (t < kTiles) gpu::ldmatrix(v[t][part], at + kValuesDistance);
    }
  }

  // c = added + a tile of keys times a place of queries.
  static __device__ __forceinline__ void multiply_keys(float (&c)[4], const uint32_t (&keys)[2][4],
                                                       const uint32_t (&b)[4], const float (&added)[4]) {
    gpu::mma_16x8x16<T>(c, keys[0], b[0], b[1], added);
    gpu::mma_16x8x16<T>(c, keys[1], b[2], b[3], c);
  }
  // Adds the weights of a tile of keys, times the rows of a place of queries.
  static __device__ __forceinline__ void multiply(int t, float (&sum)[kTiles][4][4], float (&last)[2][4],
                                                  const uint32_t (&weights)[2], const uint32_t (&rows)[4]) {
    if (t < kTiles) {
#pragma unroll
      for (int n = 0; n < 4; ++n) gpu::mma_16x8x8<T>(sum[t][n], weights[0], weights[1], rows[n], sum[t][n]);
    } else {
#pragma unroll
      for (int n = 0; n < 2; ++n) gpu::mma_16x8x8<T>(last[n], rows[2 * n], rows[2 * n + 1], weights[0], last[n]);
    }
  }

  // Adds what a row of queries says about the keys, and leaves dS for the sum over the keys. `at` goes to its end.
  template <class Scores>
  __device__ __forceinline__ void add(RowAddresses& at, const Scores& row) {
    WidthSums sums;
#pragma unroll
    for (int i = 1; i < kPlaces; ++i) sums.load(at.sums - kSumBytes, i);
#pragma unroll 1  // or the compiler puts off sums until it has no registers
    for (int place = 0; place < kPlaces; ++place, at.next_place()) {
      sums.shift();
      sums.load(at.sums, kPlaces - 1);
      uint32_t q[4], o[4], q_across[4], o_across[4];
      gpu::ldmatrix(q, at.queries);
      gpu::ldmatrix(o, at.queries + kRowBytes);
      gpu::ldmatrix_transposed(q_across, at.queries);
      gpu::ldmatrix_transposed(o_across, at.queries + kRowBytes);
      const float4 record = gpu::load_shared<float4>(at.pairs);
      const float minus_delta[2] = {record.x, record.y}, none[4] = {};
      const float minus[2] = {row.minus_log_sum(record.z, 0), row.minus_log_sum(record.w, 1)};
      const uint32_t others = row.others(place);
#pragma unroll
      for (int t = 0; t <= kTiles; ++t) {
        const int halves = t < kTiles ? 2 : 1;
        if (Scores::kIsExact) load(t, row.keys);
        float s[4], dp[4];
        row.added(s, at.bias + t * 32, 2 * t, others);
        multiply_keys(s, k[t], q, s);
        multiply_keys(dp, t < kTiles ? v[t] : k[t], o, none);
        uint32_t p[2], ds[2];
#pragma unroll
        for (int half = 0; half < halves; ++half) {
          float (&sum)[2] = sums.of(2 * t + half);
          float weight[2], gradient[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            // No part of the product: where one key has all the weight, the difference has to be 0.
            const float difference = dp[t < kTiles ? 2 * half + e : 2 + e] + minus_delta[e];
            weight[e] = row.weight(s[2 * half + e], minus[e], place * 8 + e, 2 * t + half);
            gradient[e] = weight[e] * difference;
            sum[e] += gradient[e];
          }
          p[half] = gpu::pack<T>(weight[0], weight[1]);
          ds[half] = gpu::pack<T>(gradient[0], gradient[1]);
          gpu::store_shared(at.scores + (2 * t + half) * 8 * kScoreBytes, ds[half]);
        }
        multiply(t, dv, dv_last, p, o_across);
        multiply(t, dk, dk_last, ds, q_across);
      }
      sums.store(at.sums, 0);
    }
#pragma unroll
    for (int i = 1; i < kPlaces; ++i) sums.store(at.sums - kSumBytes, i);
  }
};

// dq of four places of queries, two tiles, without the scale: sums over `rows` rows of keys.
// k: the rows of the keys. scores: dS of this lane's place of each tile.
template <class T>
__device__ __forceinline__ void sum_over_keys(float (&dq)[2][4][4], uint32_t k, const uint32_t (&scores)[2], int rows) {
  using Layout = Rows<32>;
  const int lane = int(gpu::keep(threadIdx.x) % 32);
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) dq[0][n][i] = dq[1][n][i] = 0.0f;
  const uint32_t key = (lane % 8 + lane / 16 * 8) * kScoreBytes, first = Layout::place(lane % 16, lane / 16);
  uint32_t ds[2] = {scores[0] + key, scores[1] + key}, halves[2] = {k + first, k + (first ^ 32)};
  uint32_t last = k + 48 * Layout::kBytes + Layout::place(lane % 8, lane / 8);
#pragma unroll 1
  for (; rows > 0; --rows) {
    uint32_t a[2][4], b[4], two[2][2];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) gpu::ldmatrix_transposed(a[tile], ds[tile] + i * 16 * kScoreBytes);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        gpu::ldmatrix_transposed(b, halves[m] + i * 16 * Layout::kBytes);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          gpu::mma_16x8x16<T>(dq[tile][2 * m], a[tile], b[0], b[1], dq[tile][2 * m]);
          gpu::mma_16x8x16<T>(dq[tile][2 * m + 1], a[tile], b[2], b[3], dq[tile][2 * m + 1]);
        }
      }
    }
    gpu::ldmatrix_transposed(b, last);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      gpu::ldmatrix_transposed(two[tile], ds[tile] + 48 * kScoreBytes);
#pragma unroll
      for (int n = 0; n < 4; ++n) gpu::mma_16x8x8<T>(dq[tile][n], two[tile][0], two[tile][1], b[n], dq[tile][n]);
      ds[tile] += kRowTokens * kScoreBytes, halves[tile] += kRowBytes;
    }
    last += kRowBytes;
  }
}

}  // namespace vidattn::cuda
