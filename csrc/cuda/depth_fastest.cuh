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

constexpr int kPlaces = 7, kRowTokens = 8 * kPlaces, kWidths = 2 * kPlaces - 1;
constexpr int kScoreBytes = 2 * kRowTokens;  // of dS of a key with a row of queries: eight lie in different banks
constexpr int kSumBytes = 32 * 8;            // of the sums of the bias of a difference: a lane's two depths
constexpr int kPairs = 14, kPairBytes = 8 * (kWidths + 1);  // see RowBias

// The bias in shared memory. A lane meets two neighbouring depths of queries and one of keys, so there is a pair of
// entries for each of 14 differences of depth, query minus key; and it meets two neighbouring places of keys, so the
// pairs of differences of width lie side by side, in falling order, and there is a copy that starts one pair later.
// Both pairs are then one aligned read of 16 bytes, which is the C operand of the product as it is.
struct RowBias {
  // Behind all pairs of a copy, one for keys that only fill up an eight.
  static __device__ __forceinline__ int pair_of_no_key(int rows) { return (2 * rows - 1) * kPairs; }
  static __device__ __forceinline__ int copy_bytes(int rows) { return (pair_of_no_key(rows) + 1) * kPairBytes; }

  // Adds an entry for a difference query minus key.
  static __device__ __forceinline__ void store(unsigned char* bias, int rows, int depth, int height, int width,
                                               float value) {
    if (abs(depth) > 7 || abs(height) >= rows || abs(width) >= kPlaces) return;
    for (int half = 0; half < 2; ++half) {
      const int pair = depth + 7 - half;
      if (pair < 0 || pair >= kPairs) continue;
      unsigned char* at = bias + ((height + rows - 1) * kPairs + pair) * kPairBytes + (kPlaces - 1 - width) * 8;
      reinterpret_cast<float*>(at)[half] = value;
      reinterpret_cast<float*>(at + copy_bytes(rows) + 8)[half] = value;
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
  uint32_t bias;  // address: of this lane, for this difference in height
  uint32_t copy;  // bytes between the copies of the bias
  // Exact:
  const QueryRecord* records;  // from this lane's first query of place 0 on
  int first_query, first_key;  // numbers of this lane's
  // Masked:
  float mask;     // in powers of two
  bool apart[2];  // whether the regions differ in depth or height
  uint32_t wide;  // bit per place: its region in width

  // Of two queries of a place with a key of this place and one of the next one.
  __device__ __forceinline__ void added(float (&a)[4], int query, int key) const {
    if constexpr (kExact) {
      a[0] = a[1] = a[2] = a[3] = 0.0f;
    } else {
      const int slot = kPlaces - 1 - query + key;
      const float4 quad = gpu::load_shared<float4>(bias + (slot % 2 ? copy + (slot + 1) * 8 : slot * 8));
      a[0] = quad.x, a[1] = quad.y, a[2] = quad.z, a[3] = quad.w;
    }
  }

  // query: number of the place and of the lane's query in it.
  __device__ __forceinline__ float weight(float product, float lse, int query, int which, int key) const {
    if constexpr (kExact) {
      const int n = query * 8 + which;
      const float score = group.exact(product, first_query + n, first_key + key * 8);
      return gpu::exp2_approx((score - records[n].largest) * kLog2e - records[n].log_sum);
    } else {
      const bool masked = kMasked && (apart[which] || (wide >> query ^ wide >> key) & 1);
      return gpu::exp2_approx(fmaf(product, group.factor(), masked ? mask - lse : -lse));
    }
  }
};

// A row of queries.
struct QueryRow {
  uint32_t q, dout;  // rows of 8 * 7 queries
  uint32_t lse;      // floats: log-sum-exp in powers of two
  uint32_t delta;    // for two neighbours: minus sum(dout * out) of one, of the other, of one, of the other
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

  static __device__ __forceinline__ uint32_t four_pieces() {
    const int lane = threadIdx.x % 32;
    return Layout::place(lane % 8, lane / 8);
  }
  static __device__ __forceinline__ uint32_t two_pieces(int piece) {
    const int lane = threadIdx.x % 32;
    return Layout::place(lane % 16, piece + lane / 16);
  }
  static __device__ __forceinline__ uint32_t two_pieces_across(int piece) {
    const int lane = threadIdx.x % 32;
    return Layout::place(lane % 8 + lane / 16 * 8, piece + lane / 8 % 2);
  }

  // The A operand of 16 keys.
  static __device__ __forceinline__ void load_keys(uint32_t (&a)[2][4], uint32_t rows, int t) {
    gpu::ldmatrix(a[0], rows + two_pieces(0) + t * 16 * Layout::kBytes);
    gpu::ldmatrix(a[1], rows + two_pieces(2) + t * 16 * Layout::kBytes);
  }

  // sum += weights of kCount places of queries, times their rows; for the last keys, across.
  template <int kCount>
  static __device__ __forceinline__ void multiply(float (&sum)[4][4], const uint32_t (&weights)[4], uint32_t rows) {
#pragma unroll
    for (int part = 0; part < kCount; ++part) {
      uint32_t b[4];
      gpu::ldmatrix_transposed(b, rows + (kCount == 2 ? two_pieces(2 * part) : four_pieces()));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (kCount == 1)
          gpu::mma_16x8x8<T>(sum[i], weights[0], weights[1], b[i], sum[i]);
        else if (i < 2)
          gpu::mma_16x8x16<T>(sum[2 * part + i], weights, b[2 * i], b[2 * i + 1], sum[2 * part + i]);
    }
  }
  template <int kCount>
  static __device__ __forceinline__ void multiply_last(float (&sum)[2][4], const uint32_t (&weights)[4],
                                                       uint32_t rows) {
#pragma unroll
    for (int part = 0; part < kCount; ++part) {
      uint32_t a[4];
      gpu::ldmatrix_transposed(a, rows + (kCount == 2 ? two_pieces_across(2 * part) : four_pieces()));
#pragma unroll
      for (int m = 0; m < 2; ++m)
        if (kCount == 1)
          gpu::mma_16x8x8<T>(sum[m], a[2 * m], a[2 * m + 1], weights[0], sum[m]);
        else if (m == 0)
          gpu::mma_16x8x16<T>(sum[part], a, weights[0], weights[2], sum[part]);
    }
  }

  template <int kCount, class Scores, class Widths>
  __device__ __forceinline__ void add_places(uint32_t k, uint32_t v, uint32_t scores, const QueryRow& query,
                                             const Scores& row, int first, Widths& width) {
    const int lane = threadIdx.x % 32, column = lane % 4 * 2;
    const uint32_t start = first * 8 * Layout::kBytes;
    uint32_t q[2][4], o[2][4];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t at = four_pieces() + start + i * 8 * Layout::kBytes;
      gpu::ldmatrix(q[i], query.q + at);
      gpu::ldmatrix(o[i], query.dout + at);
    }
#pragma unroll
    for (int t = 0; t <= kTiles; ++t) {
      const int halves = t < kTiles ? 2 : 1;
      uint32_t a[2][4], p[4], ds[4];
      float s[2][4], dp[2][4];
      float2 lse[2];
      load_keys(a, k, t);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float added[4];
        row.added(added, first + i, 2 * t);
        gpu::mma_16x8x16<T>(s[i], a[0], q[i][0], q[i][1], added);
        gpu::mma_16x8x16<T>(s[i], a[1], q[i][2], q[i][3], s[i]);
      }
      load_keys(a, v, t);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float4 delta = gpu::load_shared<float4>(query.delta + ((first + i) * 8 + column) * 8);
        const float minus[4] = {delta.x, delta.y, delta.z, delta.w}, none[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        gpu::mma_16x8x16<T>(dp[i], a[0], o[i][0], o[i][1], Scores::kIsExact ? none : minus);
        gpu::mma_16x8x16<T>(dp[i], a[1], o[i][2], o[i][3], dp[i]);
        if (Scores::kIsExact)  // where one key has all the weight, the difference has to be 0
          for (int j = 0; j < 4; ++j) dp[i][j] += minus[j];
        lse[i] = gpu::load_shared<float2>(query.lse + ((first + i) * 8 + column) * 4);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int half = 0; half < halves; ++half) {
          float (&sum)[2] = width.of(first + i, 2 * t + half);
          float weight[2], gradient[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            weight[e] = row.weight(s[i][2 * half + e], e == 0 ? lse[i].x : lse[i].y, first + i, e, 2 * t + half);
            gradient[e] = weight[e] * dp[i][2 * half + e];
            sum[e] += gradient[e];
          }
          p[2 * i + half] = gpu::pack<T>(weight[0], weight[1]);
          ds[2 * i + half] = gpu::pack<T>(gradient[0], gradient[1]);
          gpu::store_shared(scores + (2 * t + half) * 8 * kScoreBytes + (first + i) * 16, ds[2 * i + half]);
        }
      if (t < kTiles) {
        multiply<kCount>(dv[t], p, query.dout + start);
        multiply<kCount>(dk[t], ds, query.q + start);
      } else {
        multiply_last<kCount>(dv_last, p, query.dout + start);
        multiply_last<kCount>(dk_last, ds, query.q + start);
      }
    }
  }

  // Adds what a row of queries says about the keys, and leaves dS for the sum over the keys.
  // k, v, scores: of the first key of the row. sums: of this lane, for this difference in height; 0 for none.
  template <class Scores>
  __device__ __forceinline__ void add(uint32_t k, uint32_t v, uint32_t scores, uint32_t sums, const QueryRow& query,
                                      const Scores& row) {
    const int lane = threadIdx.x % 32;
    const uint32_t mine = scores + lane / 4 * kScoreBytes + lane % 4 * 4;
    {
      WidthSums<0, 3> width;
      add_places<2>(k, v, mine, query, row, 0, width);
      add_places<2>(k, v, mine, query, row, 2, width);
      width.store(sums);
    }
    {
      WidthSums<4, 6> width;
      add_places<2>(k, v, mine, query, row, 4, width);
      add_places<1>(k, v, mine, query, row, 6, width);
      width.store(sums);
    }
  }
};

// dq of one place, 8 queries, without the scale: sums over all keys. A lane gets elements lane % 4 * 2 and the next one
// of the four eights of query lane / 4.
// k: the rows of the keys. scores: dS of the place.
template <class T>
__device__ __forceinline__ void sum_over_keys(float (&dq)[2][4], uint32_t k, uint32_t scores, int keys) {
  using Layout = Rows<32>;
  const int lane = gpu::keep(threadIdx.x) % 32;  // nothing of it is kept from row to row: the registers are needed
  float sum[2][2][4] = {};
  const int row = lane % 8 + lane / 16 * 8, part = lane / 8 % 2;
  const uint32_t halves[2] = {Layout::place(row, part), Layout::place(row, 2 + part)};
  uint32_t scores_at = scores + lane * kScoreBytes;
  int rest = keys;
#pragma unroll 2
  for (; rest >= 32; rest -= 32) {
    uint32_t b[4];
    gpu::ldmatrix_transposed(b, scores_at);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t a[4];
        gpu::ldmatrix_transposed(a, k + halves[m] + i * 16 * Layout::kBytes);
        gpu::mma_16x8x16<T>(sum[i][m], a, b[2 * i], b[2 * i + 1], sum[i][m]);
      }
    k += 32 * Layout::kBytes, scores_at += 32 * kScoreBytes;
  }
  scores_at -= lane / 8 * 8 * kScoreBytes;
#pragma unroll 1
  for (; rest > 0; rest -= 8) {
    uint32_t a[4], b[2];
    gpu::ldmatrix_transposed(a, k + Layout::place(lane % 8, lane / 8));
    gpu::ldmatrix_transposed(b, scores_at);
    gpu::mma_16x8x8<T>(sum[0][0], a[0], a[1], b[0], sum[0][0]);
    gpu::mma_16x8x8<T>(sum[0][1], a[2], a[3], b[0], sum[0][1]);
    k += 8 * Layout::kBytes, scores_at += 8 * kScoreBytes;
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) dq[m][i] = sum[0][m][i] + sum[1][m][i];
}

template <class T>
struct DepthFastestBackward : Backward<T, 32, WindowGradientGroup<true>, kRowTokens, kRowTokens> {
  using Group = WindowGradientGroup<true>;
  using Base = Backward<T, 32, Group, kRowTokens, kRowTokens>;
  using Base::arguments, Base::plan, Base::group, Base::warp, Base::lane, Base::at;
  using Layout = Rows<32>;

  __device__ DepthFastestBackward(const WindowGradientArguments& given, const Group& of)
      : Base(given, of, int(threadIdx.x)) {}
  __device__ DepthFastestBackward(const WindowGradientArguments& given, const Group& of, int thread)
      : Base(given, of, thread) {}

  __device__ __forceinline__ uint32_t address(int place) const { return gpu::shared_address(at(place)); }
  __device__ __forceinline__ int rows() const { return int(blockDim.x) / 32; }
  // Of two neighbouring queries: their log-sum-exp, and what the products with V start from, twice.
  __device__ __forceinline__ int log_sums() const { return plan.records + 16 * this->slots(); }
  __device__ __forceinline__ int minus_deltas() const { return log_sums() + 4 * this->slots(); }
  __device__ __forceinline__ float* sums() const { return reinterpret_cast<float*>(at(plan.table_sums)); }

  // Fills what is the same for all windows. Returns whether the block met moderate numbers only.
  __device__ __forceinline__ bool begin() const {
    for (int i = threadIdx.x; i < plan.table_floats; i += blockDim.x) sums()[i] = 0.0f;
    if (arguments.pad_gradient)
      for (int i = threadIdx.x; i < rows() * 2 * Layout::kDim; i += blockDim.x) this->pad(0)[i] = 0.0f;
    unsigned char* bias = reinterpret_cast<unsigned char*>(group.bias());
    const int copy = plan.bias_floats / 2, pairs = RowBias::pair_of_no_key(rows()) * kPairBytes / 4;
    for (int i = threadIdx.x; i < plan.bias_floats; i += blockDim.x)
      group.bias()[i] = i % copy < pairs ? 0.0f : kNoWeight;
    __syncthreads();
    const bool moderate = group.for_each_bias([&](int depth, int height, int width, float value) {
      RowBias::store(bias, rows(), depth, height, width, value);
    });
    return __syncthreads_and(moderate && arguments.folds);
  }

  // Makes them of the records of the queries.
  __device__ __forceinline__ void pair_records() const {
    for (int i = threadIdx.x; i < rows() * kRowTokens / 2; i += blockDim.x) {
      const QueryRecord &first = this->records()[2 * i], &second = this->records()[2 * i + 1];
      reinterpret_cast<float2*>(at(log_sums()))[i] = make_float2(first.log_sum, second.log_sum);
      reinterpret_cast<float4*>(at(minus_deltas()))[i] =
          make_float4(first.minus_delta, second.minus_delta, first.minus_delta, second.minus_delta);
    }
  }

  template <bool kExact, bool kMasked>
  __device__ __forceinline__ void meet(DepthFastestKeys<T>& keys, int row) const {
    const int column = lane % 4 * 2, depth = lane / 4, difference = row - warp + rows() - 1;
    RowScores<kExact, kMasked, Group> scores{group};
    if constexpr (kExact) {
      scores.first_query = row * kRowTokens + column, scores.first_key = warp * kRowTokens + depth;
      scores.records = this->records() + scores.first_query;
    } else {
      const int pair = group.is_key(depth) ? difference * kPairs + 7 + column - depth : RowBias::pair_of_no_key(rows());
      scores.bias = gpu::shared_address(group.bias()) + pair * kPairBytes;
      scores.copy = RowBias::copy_bytes(rows());
      if constexpr (kMasked) {
        const int height = (group.region(row * kRowTokens) ^ group.region(warp * kRowTokens)) & 2;
        for (int i = 0; i < 2; ++i) scores.apart[i] = height || (group.region(column + i) ^ group.region(depth)) & 1;
        scores.mask = group.mask_added() * group.factor(), scores.wide = 0;
        for (int place = 0; place < kPlaces; ++place)
          scores.wide |= uint32_t(group.region(place * 8) >> 2 & 1) << place;
      }
    }
    const uint32_t start = warp * kRowTokens;
    const QueryRow query{gpu::shared_address(this->queries(row % 2, 0)), gpu::shared_address(this->queries(row % 2, 1)),
                         address(log_sums()) + row * kRowTokens * 4, address(minus_deltas()) + row * kRowTokens * 8};
    keys.add(address(kKeysPlace) + start * Layout::kBytes, address(plan.values) + start * Layout::kBytes,
             address(plan.scores) + start * kScoreBytes,
             plan.table_floats ? address(plan.table_sums) + difference * kWidths * kSumBytes + lane * 8 : 0, query,
             scores);
  }

  // dQ of a row of queries.
  __device__ __forceinline__ void write_queries(int row) const {
#pragma unroll 1
    for (int place = warp; place < kPlaces; place += rows()) {
      float dq[2][4];
      sum_over_keys<T>(dq, address(kKeysPlace), address(plan.scores) + place * 16, group.keys());
      char* to = group.gradient(kDq, row * kRowTokens + place * 8 + lane / 4);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float *pair = &dq[n / 2][n % 2 * 2], scale = group.scale();
        const uint32_t packed = gpu::transpose(gpu::pack<T>(pair[0] * scale, pair[1] * scale));
        if (to) write_pair(to, n * 8 + lane % 4 * 2, group.head_dim(), arguments.gradient_unit, packed);
      }
    }
  }

  // Writes dK or dV of the warp's keys, times `scale`, by way of the shared memory where their rows were.
  __device__ __forceinline__ void write_keys(Slot slot, int place_of_rows, float (&sum)[3][4][4], float (&last)[2][4],
                                             float scale) const {
    const int start = warp * kRowTokens;
    const uint32_t rows = address(place_of_rows) + start * Layout::kBytes;
#pragma unroll
    for (int place = 0; place < kPlaces; ++place)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float* pair = place + 1 < kPlaces ? &sum[place / 2][n][place % 2 * 2] : &last[n / 2][n % 2 * 2];
        pair[0] *= scale, pair[1] *= scale;
        uint32_t packed = gpu::pack<T>(pair[0], pair[1]);
        if (place + 1 == kPlaces) packed = gpu::transpose(packed);
        gpu::store_shared(rows + Layout::place(place * 8 + lane / 4, n) + lane % 4 * 4, packed);
      }
    __syncwarp();
    bool padded = false;
#pragma unroll 1
    for (int i = lane; i < kRowTokens * Layout::kPieces; i += 32) {
      const int n = i / Layout::kPieces, piece = i % Layout::kPieces;
      char* to = group.gradient(slot, start + n);
      padded |= !to;
      if (to)
        write_piece(to, piece, group.head_dim(), arguments.gradient_unit,
                    gpu::load_shared<uint4>(rows + Layout::place(n, piece)));
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
    __syncthreads();
    DepthFastestKeys<T> keys;
    keys.reset();
#pragma unroll 1
    for (int row = 0; row < rows(); ++row) {
      if (row + 1 < rows()) this->copy_queries((row + 1) * kRowTokens, (row + 1) % 2);
      if (!kExact && group.masks())
        meet<kExact, true>(keys, row);
      else
        meet<kExact, false>(keys, row);
      gpu::cp_async_wait<0>();
      __syncthreads();
      write_queries(row);
      __syncthreads();
    }
    const DepthFastestBackward after(arguments, group, gpu::keep(threadIdx.x));  // nor from window to window
    after.write_keys(kDk, kKeysPlace, keys.dk, keys.dk_last, group.scale());
    after.write_keys(kDv, plan.values, keys.dv, keys.dv_last, 1.0f);
  }

  // The share's sums of the table's gradient. Lanes with one difference of depth are added in their order.
  __device__ __forceinline__ void write_table() const {
    if (!plan.table_floats) return;
    float* part =
        arguments.table_parts + (int64_t(this->share()) * arguments.call.heads + group.head()) * group.table_rows();
    group.for_each_difference([&](int n, int depth, int height, int width) {
      float sum = 0.0f;
      if (abs(depth) < 8 && abs(height) < rows() && abs(width) < kPlaces) {
        const float* from = sums() + ((height + rows() - 1) * kWidths + width + kPlaces - 1) * (kSumBytes / 4);
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
  backward.pair_records();
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
      backward.copy_block(0);
      moderate = __syncthreads_and(backward.read_statistics());
      backward.pair_records();
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
