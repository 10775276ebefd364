// What a block of the backward pass knows of a group, in its shared memory: rows of keys and of queries, and for each
// query a record.
#pragma once
#include "forward.cuh"
#include "plan.h"

namespace vidattn::cuda {

constexpr float kLargestLogSum = 1024;  // in powers of two: beyond, its rounding shows in float16

__device__ __forceinline__ float plus_infinity() {
  return __int_as_float(0x7f800000);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Where a block of threads is in its share. It lies at the start of shared memory, so that no register holds it while
// other functions run.
struct Progress {
  int head, group, end;
  bool first;  // no window of the share has been done
  bool folds;
  int share;
  int round;  // of a block that walks over sequences
};
static_assert(sizeof(Progress) <= kBasesPlace && kBasesPlace + kBaseBytes <= kKeysPlace);

template <class Arguments>
__device__ __forceinline__ Progress first_progress(const Arguments& arguments) {
  const int share = arguments.heads.quotient(int(blockIdx.x));
  const int begin = share * arguments.share_groups + min(share, arguments.longer_shares);
  return {arguments.heads.remainder(int(blockIdx.x)),
          begin,
          begin + arguments.share_groups + (share < arguments.longer_shares),
          true,
          false,
          share,
          0};
}

// Anew each time it is asked for: what follows from it would otherwise stay in registers.
__device__ __forceinline__ int thread_of_block() {
  return int(gpu::keep(threadIdx.x) & 1023);
}

// What the block knows of a query. Exact: log2 of the sum of its weights, and the largest score that they refer to.
struct QueryRecord {
  float log_sum;      // of its scores, in powers of two
  float minus_delta;  // delta = sum(dO * O)
  union {
    float largest;
    int bias;  // four times its bias row
  };
  int region;
};

// The shared memory of a block, and its share of the groups.
template <class T, int kDim, class Group, int kKeys, int kQueries>
struct BackwardRows {
  using Arguments = typename Group::Arguments;
  using Layout = Rows<kDim>;
  using Scores = Rows<kQueries <= 32 ? 32 : 64>;  // dS^T: a row is a key, its elements are the queries of a tile
  static constexpr int kTiles = (kKeys + 15) / 16, kSteps = (kQueries + 15) / 16;
  static constexpr int kPieceJobs = kDim / 32;  // a warp makes dQ of 16 queries and so many times 16 elements at a time
  static constexpr int kJobs = kSteps * 2;

  const Arguments& arguments;
  const BackwardPlan& plan;
  const Group& group;
  const int warp, lane;

  __device__ BackwardRows(const Arguments& given, const Group& of) : BackwardRows(given, of, thread_of_block()) {}
  __device__ BackwardRows(const Arguments& given, const Group& of, int thread)
      : arguments(given), plan(given.backward), group(of), warp(thread / 32), lane(thread % 32) {}

  __device__ __forceinline__ unsigned char* at(int place) const { return gpu::shared_memory<unsigned char>() + place; }
  __device__ __forceinline__ unsigned char* queries(int stage, int which) const {
    return at(plan.queries + (2 * stage + which) * kQueries * Layout::kBytes);
  }
  __device__ __forceinline__ int scores(int tile) const {
    return plan.scores + (plan.score_tiles == 2 && (tile + group.turn()) % 2 ? plan.rows * Scores::kBytes : 0);
  }
  // Where keys and values lie: there may be two halves, of which a group has one.
  __device__ __forceinline__ int keys_place() const { return kKeysPlace + group.half(); }
  __device__ __forceinline__ int values_place() const { return plan.values + group.half(); }
  __device__ __forceinline__ int records_place() const { return plan.records + group.records(); }
  // Which of the stages has a tile of queries.
  __device__ __forceinline__ int stage_of(int query) const {
    return (query / kQueries + group.turn()) % Group::kStages;
  }
  __device__ __forceinline__ int slots() const { return arguments.slots; }
  __device__ __forceinline__ QueryRecord* records() const {
    return reinterpret_cast<QueryRecord*>(at(records_place()));
  }
  __device__ __forceinline__ float* table(int warp) const {
    float* tables = plan.table_is_shared ? reinterpret_cast<float*>(at(plan.table_sums)) : arguments.block_tables();
    return tables + warp * plan.table_floats;
  }
  __device__ __forceinline__ float* pad(int warp) const {
    return reinterpret_cast<float*>(at(plan.pad_sums)) + warp * 2 * kDim;
  }
  __device__ __forceinline__ int block_keys() const { return plan.block_keys; }
  // The first key of this warp.
  __device__ __forceinline__ int key(int block) const { return block * block_keys() + thread_of_block() / 32 * kKeys; }
  // Keys of a block, and of a warp in it.
  __device__ __forceinline__ int count(int block) const {
    return min(group.keys() - block * block_keys(), block_keys());
  }
  __device__ __forceinline__ int warp_count(int block, int warp) const {
    return max(0, min(count(block) - warp * kKeys, kKeys));
  }

  // ---- Copies ----

  __device__ __forceinline__ void copy_queries(int first) const {
    const int stage = stage_of(first);
    copy_rows<kDim>(group, kQ, kDout, first, group.keys() - first, kQueries, queries(stage, 0), queries(stage, 1),
                    thread_of_block(), int(blockDim.x));
    gpu::cp_async_commit();
  }

  // A block of keys, zeros behind the last one, and the first queries.
  __device__ __forceinline__ void copy_block(int block) const {
    const int first = block * block_keys(), rows = min(plan.rows, (count(block) + kKeys % 16 + 31) / 32 * 32);
    copy_rows<kDim>(group, kK, kV, first, count(block), rows, at(keys_place()), at(values_place()), thread_of_block(),
                    int(blockDim.x));
    copy_queries(0);
  }

  // ---- Statistics of the rows of scores ----

  // From what the forward pass saved. Returns whether this thread met moderate numbers only.
  __device__ __forceinline__ bool read_statistics() const {
    bool moderate = true;
    for (int n = thread_of_block() / 4; n < slots(); n += blockDim.x / 4) {
      const int token = group.token(n);
      float sum = 0.0f;
      if (token >= 0) {
        const char* out = group.row(kOut, n);
#pragma unroll
        for (int piece = lane & 3; piece < Layout::kPieces; piece += 4) {
          if (piece * 8 >= group.head_dim()) break;
          uint32_t o[4], g[4];
          load_words(o, out, piece), load_words(g, group.dout(n), piece);
          const T *x = reinterpret_cast<const T*>(o), *y = reinterpret_cast<const T*>(g);
#pragma unroll
          for (int i = 0; i < 8; ++i) sum = fmaf(to_float(x[i]), to_float(y[i]), sum);
        }
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0) {
        const float log_sum = token >= 0 ? *group.lse(token) * kLog2e : 0.0f;
        moderate &= fabsf(log_sum) <= kLargestLogSum;
        write_record(n, token >= 0 ? log_sum : plus_infinity(), sum);
      }
    }
    return moderate;
  }
  // log_sum = inf: a query that is none has no weights.
  __device__ __forceinline__ void write_record(int n, float log_sum, float delta) const {
    QueryRecord record;
    record.log_sum = log_sum, record.minus_delta = -delta, record.bias = group.bias_offset(n),
    record.region = group.region(n);
    records()[n] = record;
  }
  // From what the forward pass saved and, as a row is short, from all its scores: then delta has the same weights and
  // products as dS, and no error of a rounded O. To be called when all keys have arrived.
  __device__ __forceinline__ bool refine_statistics() const {
    bool moderate = true;
#pragma unroll 1
    for (int first = 16 * warp; first < slots(); first += 16 * plan.warps) {
      const int row = first + lane / 4;
      uint32_t q[kDim / 16][4], g[kDim / 16][4];
      load_queries<kDim>(q, group.query(row), group.query(row + 8), group.head_dim(), group.unit(kQ));
      load_queries<kDim>(g, group.dout(row), group.dout(row + 8), group.head_dim(), group.unit(kDout));
      float top[2], sum[2] = {0.0f, 0.0f}, product[2] = {0.0f, 0.0f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = group.token(row + 8 * half);
        top[half] = token >= 0 ? *group.lse(token) * kLog2e : plus_infinity();
      }
#pragma unroll 1
      for (int n = 0; n < group.keys(); n += 8) {
        float s[4], dp[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        const int key = n + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[i] = group.bias_at(group.key_bias(key + i % 2), group.bias_offset(row + i / 2 * 8));
          if (group.masks()) s[i] += group.mask_of(key + i % 2, group.region(row + i / 2 * 8));
        }
        multiply_rows(s, q, at(keys_place()), n);
        multiply_rows(dp, g, at(values_place()), n);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float weight =
              key + i % 2 < group.keys() ? gpu::exp2_approx(fmaf(s[i], group.factor(), -top[i / 2])) : 0.0f;
          sum[i / 2] += weight, product[i / 2] = fmaf(weight, dp[i], product[i / 2]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = sum_of_quad(sum[half]), delta = sum_of_quad(product[half]);
        if (lane % 4) continue;
        const bool real = group.is_real(row + 8 * half);
        moderate &= !real || (fabsf(top[half]) <= kLargestLogSum && total > 0.5f && total < 2.0f);
        write_record(row + 8 * half, real ? top[half] + log2f(total) : plus_infinity(), real ? delta / total : 0.0f);
      }
    }
    return moderate;
  }
  static __device__ __forceinline__ float sum_of_quad(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
  __device__ __forceinline__ void load_words(uint32_t (&words)[4], const char* row, int piece) const {
    if (group.dout_unit() == 16) {
      const uint4 four = *reinterpret_cast<const uint4*>(row + 16 * piece);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
      load_piece(words, row, piece * 8, group.head_dim());
    }
  }

  // From all scores of a row, step by step as the reference takes them: for numbers of any size. Block 0 has to be on
  // its way.
  __device__ __forceinline__ void scan_rows() const {
    const int warps = plan.warps;
#pragma unroll 1
    for (int pass = 0; pass < slots(); pass += 16 * warps) {
      const int first = pass + 16 * warp, row = first + lane / 4;
      // Zeros, lest the compiler takes what is there before for theirs, and the callers have fewer registers.
      uint32_t q[kDim / 16][4] = {}, g[kDim / 16][4] = {};
      float top[2] = {kLowest, kLowest}, sum[2] = {0.0f, 0.0f}, product[2] = {0.0f, 0.0f};
      if (first < group.keys()) {
        load_queries<kDim>(q, group.query(row), group.query(row + 8), group.head_dim(), group.unit(kQ));
        load_queries<kDim>(g, group.dout(row), group.dout(row + 8), group.head_dim(), group.unit(kDout));
      }
#pragma unroll 1
      for (int block = 0; block < plan.blocks; ++block) {
        if (plan.blocks > 1 && (pass > 0 || block > 0)) {
          __syncthreads();
          copy_block(block);
        }
        if (plan.blocks > 1 || pass == 0) {
          gpu::cp_async_wait<0>();
          __syncthreads();
        }
        if (first < group.keys())
#pragma unroll 1
          for (int n = 0; n < count(block); n += 8) scan_keys(q, g, row, block * block_keys(), n, top, sum, product);
      }
      if (first >= slots()) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = row + 8 * half;
        const bool real = group.is_real(n);
        float largest = maximum_of_quad(top[half]);
        const float shrink = gpu::exp2_approx((top[half] - largest) * kLog2e);
        float total = sum[half] * shrink, delta = product[half] * shrink;
        total = sum_of_quad(total), delta = sum_of_quad(delta);
        if (lane % 4 || n >= slots()) continue;
        const bool none = !real || total == 0.0f;
        QueryRecord record;
        record.log_sum = none ? 0.0f : log2f(total), record.minus_delta = none ? 0.0f : -delta / total;
        record.largest = none ? plus_infinity() : largest, record.region = 0;
        records()[n] = record;
      }
    }
    if (plan.blocks > 1) {
      __syncthreads();
      copy_block(0);
    }
  }
  __device__ __forceinline__ void scan_keys(const uint32_t (&q)[kDim / 16][4], const uint32_t (&g)[kDim / 16][4],
                                            int row, int first, int n, float (&top)[2], float (&sum)[2],
                                            float (&product)[2]) const {
    float s[4] = {0.0f, 0.0f, 0.0f, 0.0f}, dp[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply_rows(s, q, at(keys_place()), n);
    multiply_rows(dp, g, at(values_place()), n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + n + lane % 4 * 2 + i % 2;
      if (key >= group.keys()) continue;
      const float score = group.exact(s[i], row + i / 2 * 8, key);
      if (score > top[i / 2]) {
        const float shrink = gpu::exp2_approx((top[i / 2] - score) * kLog2e);
        sum[i / 2] *= shrink, product[i / 2] *= shrink, top[i / 2] = score;
      }
      const float weight = gpu::exp2_approx((score - top[i / 2]) * kLog2e);
      sum[i / 2] += weight, product[i / 2] = fmaf(weight, dp[i], product[i / 2]);
    }
  }

  // c += a (the 8 rows from `first` on of an area)^T.
  __device__ __forceinline__ void multiply_rows(float (&c)[4], const uint32_t (&a)[kDim / 16][4],
                                                const unsigned char* rows, int first) const {
#pragma unroll
    for (int part = 0; part < kDim / 32; ++part) {
      uint32_t b[4];
      gpu::ldmatrix(b, gpu::shared_address(rows) + four_pieces(4 * part) + first * Layout::kBytes);
      gpu::mma_16x8x16<T>(c, a[2 * part], b[0], b[1], c);
      gpu::mma_16x8x16<T>(c, a[2 * part + 1], b[2], b[3], c);
    }
  }

  // Rows a multiple of 8 apart have their pieces in the same places: see Walk.
  __device__ __forceinline__ uint32_t four_pieces(int piece) const { return Layout::place(lane % 8, piece + lane / 8); }
};

}  // namespace vidattn::cuda
