// Gradients of softmax(scale * Q K^T + added) V, for all groups of a share of one head's, one after the other, by one
// block of threads.
//
//   P = 2^(S - log-sum-exp)      dP = dO V^T      dS = P * (dP - delta)
//   dV = P^T dO                  dK = scale dS^T Q                 dQ = scale dS K
//
// A warp owns keys: their dK and dV stay in its registers, while the queries come by in tiles. It takes the products
// transposed, S^T = K Q^T and dP^T = V dO^T, because their results, rounded and packed, are what the next products take
// as their first operand. dQ sums over all keys: each warp leaves its dS^T in shared memory, and some of them multiply
// it with K when all have. Where not all keys have room, they come in blocks, and dQ is added up in float32 in memory
// that belongs to the block of threads.
//
// Nothing is added atomically: each sum has one owner and one order.
#pragma once
#include "backward_rows.cuh"
#include "row_sums.cuh"

namespace vidattn::cuda {

constexpr float kNoWeight = -1e30f;  // added to a score

// How scores come about: with the bias as part of the product, with the mask too, or step by step.
enum class Way { kPlain, kMasked, kExact };

// dK and dV of a warp's keys. A lane has the keys lane / 4 and 8 more of each tile of 16, like the C operand of mma.
template <int kDim, int kTiles>
struct KeySums {
  float dk[kTiles][kDim / 8][4], dv[kTiles][kDim / 8][4];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) dk[t][n][i] = dv[t][n][i] = 0.0f;
  }
};

// A block of threads and its share of the groups.
template <class T, int kDim, class Group, int kKeys, int kQueries>
struct Backward : BackwardRows<T, kDim, Group, kKeys, kQueries> {
  using Base = BackwardRows<T, kDim, Group, kKeys, kQueries>;
  using Base::arguments, Base::plan, Base::group, Base::warp, Base::lane;
  using Base::at, Base::block_keys, Base::copy_queries, Base::count, Base::key, Base::keys_place, Base::pad,
      Base::records, Base::records_place, Base::scores, Base::slots, Base::stage_of, Base::table, Base::values_place,
      Base::warp_count;
  using Base::kJobs, Base::kPieceJobs, Base::kSteps, Base::kTiles;
  using typename Base::Arguments;
  using typename Base::Layout;
  using typename Base::Scores;
  using Sums = KeySums<kDim, kTiles>;

  using Base::Base;

  // ---- A block of keys ----

  // c += the rows of this warp's keys times 16 rows of a tile of queries; the addresses are of this lane's part of the
  // first two pieces of 16 rows of the ones, and of the first four of 8 rows of the others. As areas start at multiples
  // of 8 rows, other pieces of these rows differ from them in bits.
  template <int kUsed>
  __device__ __forceinline__ void multiply(float (&c)[2][kUsed][4], uint32_t keys, uint32_t four) const {
#pragma unroll
    for (int part = 0; part < kDim / 32; ++part) {
      uint32_t b[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) gpu::ldmatrix(b[half], (four ^ 64 * part) + 8 * half * Layout::kBytes);
#pragma unroll
      for (int t = 0; t < kUsed; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t a[4];
          gpu::ldmatrix(a, (keys ^ 32 * (2 * part + i)) + 16 * t * Layout::kBytes);
#pragma unroll
          for (int half = 0; half < 2; ++half)
            gpu::mma_16x8x16<T>(c[half][t], a, b[half][2 * i], b[half][2 * i + 1], c[half][t]);
        }
    }
  }

  // The queries from `first` on, a tile, meet the keys of this warp, which are in the first kUsed of its tiles. Plain:
  // these hold keys alone.
  template <Way kWay, int kUsed = kTiles, class Table>
  __device__ __forceinline__ void meet_queries(Sums& sums, const Table& table, const uint32_t (&biases)[kTiles][2],
                                               int block, int count, int first) const {
    constexpr int kArea = kQueries * Layout::kBytes;
    const int thread = thread_of_block(), lane = thread % 32, stage = stage_of(first);
    const uint32_t start = gpu::shared_address(at(0));
    const uint32_t four = start + plan.queries + 2 * stage * kArea + Layout::place(lane % 8, lane / 8);
    const uint32_t two = start + plan.queries + 2 * stage * kArea + Layout::place(lane % 16, lane / 16);
    const uint32_t keys =
        start + keys_place() + thread / 32 * kKeys * Layout::kBytes + Layout::place(lane % 16, lane / 16);
    const int column = lane % 4 * 2;
    const uint32_t record = start + records_place() + (first + column) * int(sizeof(QueryRecord));
    const int to = scores(first / kQueries) + Scores::place(thread / 32 * kKeys + lane / 4, 0) + lane % 4 * 4;
    [[maybe_unused]] constexpr int kUnrolled =
        kWay != Way::kExact && kDim == 32 ? kSteps : 1;  // as far as registers go
#pragma unroll kUnrolled
    for (int step = 0; step < kSteps; ++step) {
      if (first + 16 * step >= group.keys()) break;
      const uint32_t rows_at = 16 * step * Layout::kBytes;
      const auto record_of = [&](int i) {  // of this lane's four queries
        return record + (16 * step + i / 2 * 8 + i % 2) * int(sizeof(QueryRecord));
      };
      int2 added[4] = {};  // the bias row, or the largest score; the region
      float2 of[4];        // the log-sum-exp, minus delta
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (Group::kHasSums || kWay == Way::kExact)
          added[i] = gpu::load_shared<int2>(record_of(i) + int(offsetof(QueryRecord, bias)));
      float p[2][kUsed][4], ds[2][kUsed][4];  // (16 keys, 8 queries)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int t = 0; t < kUsed; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            p[half][t][i] = kWay == Way::kExact ? 0.0f : group.bias_at(biases[t][i / 2], added[2 * half + i % 2].x);
      if (kWay == Way::kMasked && group.masks()) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int t = 0; t < kUsed; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              p[half][t][i] += group.mask_of(key(block) + 16 * t + lane / 4 + i / 2 * 8, added[2 * half + i % 2].y);
      }
      multiply(p, keys, four + rows_at);
#pragma unroll
      for (int i = 0; i < 4; ++i) of[i] = gpu::load_shared<float2>(record_of(i));
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int t = 0; t < kUsed; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2& query = of[2 * half + i % 2];
            float& x = p[half][t][i];
            if constexpr (kWay != Way::kExact) {
              x = gpu::exp2_approx(fmaf(x, group.factor(), -query.x));
            } else {
              const int lane = thread_of_block() % 32;
              const int with = min(key(block) + 16 * t + lane / 4 + i / 2 * 8, group.keys() - 1);
              const float score = group.exact(x, first + 16 * step + 8 * half + lane % 4 * 2 + i % 2, with);
              x = gpu::exp2_approx((score - __int_as_float(added[2 * half + i % 2].x)) * kLog2e - query.x);
            }
          }
      if (kWay != Way::kPlain && count < kKeys) {  // what only fills up the tiles is no key
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int t = 0; t < kUsed; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (16 * t + lane / 4 + i / 2 * 8 >= count) p[half][t][i] = 0.0f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int t = 0; t < kUsed; ++t) ds[half][t][0] = ds[half][t][1] = ds[half][t][2] = ds[half][t][3] = 0.0f;
      multiply(ds, keys + (plan.values - kKeysPlace), four + rows_at + kArea);
      uint32_t p_packed[kUsed][4], ds_packed[kUsed][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int t = 0; t < kUsed; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i)  // a difference of equals is 0, as delta was no part of the product
            ds[half][t][i] = p[half][t][i] * (ds[half][t][i] + of[2 * half + i % 2].y);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            p_packed[t][2 * half + i] = gpu::pack<T>(p[half][t][2 * i], p[half][t][2 * i + 1]);
            ds_packed[t][2 * half + i] = gpu::pack<T>(ds[half][t][2 * i], ds[half][t][2 * i + 1]);
            *reinterpret_cast<uint32_t*>(at((to ^ 32 * step ^ 16 * half) + (16 * t + 8 * i) * Scores::kBytes)) =
                ds_packed[t][2 * half + i];
          }
          if constexpr (Group::kHasSums)
            if (table.wanted()) table.put(t, ds[half][t]);
        }
        if constexpr (Group::kHasSums)
          if (table.wanted()) table.template add<kWay != Way::kExact>(first + 16 * step + 8 * half);
      }
#pragma unroll
      for (int part = 0; part < kDim / 16; ++part) {
        uint32_t q[4], g[4];
        gpu::ldmatrix_transposed(g, (two ^ 32 * part) + rows_at + kArea);
        gpu::ldmatrix_transposed(q, (two ^ 32 * part) + rows_at);
#pragma unroll
        for (int t = 0; t < kUsed; ++t) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float (&dv)[4] = sums.dv[t][2 * part + i], (&dk)[4] = sums.dk[t][2 * part + i];
            gpu::mma_16x8x16<T>(dv, p_packed[t], g[2 * i], g[2 * i + 1], dv);
            gpu::mma_16x8x16<T>(dk, ds_packed[t], q[2 * i], q[2 * i + 1], dk);
          }
        }
      }
    }
  }

  // dQ of a tile of queries from this block's keys.
  __device__ __forceinline__ void sum_queries(int block, int query) const {
    for (int job = thread_of_block() / 32; job < kJobs; job += plan.warps) sum_queries(block, query, job);
  }
  // One of the jobs that this is divided into: half of the elements of 16 queries.
  __device__ __forceinline__ void sum_queries(int block, int query, int job) const {
    const int step = job / 2, half = job % 2;
    if (query + 16 * step >= group.keys()) return;
    float sum[1][2 * kPieceJobs][4];
    sum_half(sum, count(block), query, step, half);
    write_queries(block, query + 16 * step, 16 * half * kPieceJobs, sum[0]);
  }
  // The same of so many times 16 queries, from number `step` of a tile on, over `keys` keys; not scaled.
  template <int kSixteens>
  __device__ __forceinline__ void sum_half(float (&sum)[kSixteens][2 * kPieceJobs][4], int keys, int query, int step,
                                           int half) const {
    const int lane = thread_of_block() % 32, part = half * kPieceJobs;
#pragma unroll
    for (int s = 0; s < kSixteens; ++s)
#pragma unroll
      for (int j = 0; j < 2 * kPieceJobs; ++j) sum[s][j][0] = sum[s][j][1] = sum[s][j][2] = sum[s][j][3] = 0.0f;
    const uint32_t ds = gpu::shared_address(at(scores(query / kQueries))) +
                        Scores::place(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2);
    uint32_t k[kPieceJobs];
#pragma unroll
    for (int j = 0; j < kPieceJobs; ++j)
      k[j] = gpu::shared_address(at(keys_place())) + Layout::place(lane % 16, 2 * (part + j) + lane / 16);
#pragma unroll 2
    for (int row = 0; row < keys; row += 16) {
      uint32_t a[kSixteens][4], b[4];
#pragma unroll
      for (int s = 0; s < kSixteens; ++s) gpu::ldmatrix_transposed(a[s], (ds ^ 32 * s) + row * Scores::kBytes);
#pragma unroll
      for (int j = 0; j < kPieceJobs; ++j) {
        gpu::ldmatrix_transposed(b, k[j] + row * Layout::kBytes);
#pragma unroll
        for (int s = 0; s < kSixteens; ++s) {
          gpu::mma_16x8x16<T>(sum[s][2 * j], a[s], b[0], b[1], sum[s][2 * j]);
          gpu::mma_16x8x16<T>(sum[s][2 * j + 1], a[s], b[2], b[3], sum[s][2 * j + 1]);
        }
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ void write_queries(int block, int query, int element, float (&sum)[kCount][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int lane = thread_of_block() % 32, n = query + lane / 4 + 8 * half, first = element + lane % 4 * 2;
      char* to = group.gradient(kDq, n);
      if (!to) continue;
      if (plan.blocks > 1) {
        float* kept = arguments.dq_sums + (int64_t(blockIdx.x) * slots() + n) * kDim + first;  // by this thread alone
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          float2& at = *reinterpret_cast<float2*>(kept + 8 * j);
          float &x = sum[j][2 * half], &y = sum[j][2 * half + 1];
          if (block > 0) x += at.x, y += at.y;
          if (block + 1 < plan.blocks) at = make_float2(x, y);
        }
        if (block + 1 < plan.blocks) continue;
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[j][2 * half] *= group.scale(), sum[j][2 * half + 1] *= group.scale();
      if constexpr (Group::kSharesTokens)
        if (group.is_shared(n)) {
#pragma unroll
          for (int j = 0; j < kCount; ++j)
            group.write_shared(kDq, first + 8 * j, sum[j][2 * half], sum[j][2 * half + 1]);
          continue;
        }
      const auto write = [&](int unit) {
#pragma unroll
        for (int j = 0; j < kCount; ++j)
          write_pair(to, first + 8 * j, group.head_dim(), unit, gpu::pack<T>(sum[j][2 * half], sum[j][2 * half + 1]));
      };
      if (arguments.gradient_unit >= 4)
        write(4);
      else
        write(2);
    }
  }

  // dK and dV of keys, one after the other, by way of their rows of V in shared memory, which nobody needs any more: 16
  // bytes at a time. A token that other groups have too gets float32.
  __device__ __forceinline__ void stage_keys(Sums& sums, int block) const {
    const int thread = thread_of_block(), lane = thread % 32, warp = thread / 32;
    const int key = block * block_keys() + warp * kKeys, count = warp_count(block, warp);
    unsigned char* const rows = at(values_place() + warp * kKeys * Layout::kBytes);
    const uint32_t to = gpu::shared_address(rows) + Layout::place(lane / 4, 0) + lane % 4 * 4;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      auto& sum = which ? sums.dv : sums.dk;
      if (which == 0)
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int i = 0; i < kDim / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[t][i][j] *= group.scale();
      if (group.is_shared(key) && lane < 4) {
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i)
          group.write_shared(which ? kDv : kDk, i * 8 + lane * 2, sum[0][i][0], sum[0][i][1]);
      }
      __syncwarp();
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < kDim / 8; ++i)
            gpu::store_shared((to ^ 16 * i) + (16 * t + 8 * half) * Layout::kBytes,
                              gpu::pack<T>(sum[t][i][2 * half], sum[t][i][2 * half + 1]));
      __syncwarp();
      group.template write_rows<kDim, Layout::kPieces>(which ? kDv : kDk, key, count, 0, rows, lane);
    }
  }

  // Writes dK and dV of keys; those of padding are added to the sums of the warp.
  __device__ __forceinline__ void write_keys(Sums& sums, int block) const {
    const int thread = thread_of_block(), lane = thread % 32, warp = thread / 32;
    const int key = block * block_keys() + warp * kKeys, count = warp_count(block, warp);
    bool real[kTiles][2], padded = false;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = 16 * t + lane / 4 + 8 * half;
        char *dk = nullptr, *dv = nullptr;
        if (n < count) dk = group.gradient(kDk, key + n), dv = group.gradient(kDv, key + n);
        real[t][half] = dk || n >= count;
        padded |= !real[t][half];
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i) {
          const int at = i * 8 + lane % 4 * 2;
          float* k = &sums.dk[t][i][2 * half];
          k[0] *= group.scale(), k[1] *= group.scale();
          if (!dk) continue;
          write_pair(dk, at, group.head_dim(), arguments.gradient_unit, gpu::pack<T>(k[0], k[1]));
          write_pair(dv, at, group.head_dim(), arguments.gradient_unit,
                     gpu::pack<T>(sums.dv[t][i][2 * half], sums.dv[t][i][2 * half + 1]));
        }
      }
    if (!arguments.pad_gradient || !__any_sync(~0u, padded)) return;
#pragma unroll
    for (int which = 0; which < 2; ++which)
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float sum = 0.0f;
#pragma unroll
          for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              sum += real[t][half] ? 0.0f : (which ? sums.dv : sums.dk)[t][i][2 * half + j];
#pragma unroll
          for (int bits = 4; bits < 32; bits *= 2) sum += __shfl_xor_sync(~0u, sum, bits);
          if (lane < 4) pad(warp)[which * kDim + i * 8 + lane * 2 + j] += sum;
        }
  }

  __device__ __forceinline__ auto row_sums(int key, int count) const {
    if constexpr (Group::kHasSums)
      return RowSums<Group, kKeys>(group, plan.buffers + warp * kBufferBytes, plan.table_floats && count > 0,
                                   (plan.table_is_shared ? plan.table_sums : 0) + warp * plan.table_floats * 4, key,
                                   count);
    else
      return 0;
  }

  // All queries meet a block of keys, which is on its way to shared memory.
  template <bool kFolded>
  __device__ __forceinline__ void run_block(int block) const {
    const int key = block * block_keys() + warp * kKeys, count = warp_count(block, warp);
    gpu::cp_async_wait<0>();
    __syncthreads();
    uint32_t biases[kTiles][2];
    Sums sums;
    sums.reset();
    if (count > 0)
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) biases[t][half] = group.key_bias(key + 16 * t + lane / 4 + 8 * half);
      }
    const auto table = row_sums(key, count);
#pragma unroll 1
    for (int query = 0; query < group.keys(); query += kQueries) {
      if (query + kQueries < group.keys()) copy_queries(query + kQueries);
      if constexpr (kFolded) {
        if (count == kKeys && !group.masks())
          meet_queries<Way::kPlain>(sums, table, biases, block, count, query);
        else if (count > 0)
          meet_queries<Way::kMasked>(sums, table, biases, block, count, query);
      } else if (count > 0) {
        meet_queries<Way::kExact>(sums, table, biases, block, count, query);
      }
      gpu::cp_async_wait<0>();
      __syncthreads();
      sum_queries(block, int(gpu::keep(query)));
      if (plan.score_tiles == 1) __syncthreads();
    }
    if (count == 0) return;
    if constexpr (Group::kHasSums)
      write_keys(sums, block);
    else
      stage_keys(sums, block);
  }

  // One block of keys after the other; the first one is on its way.
  template <bool kFolded>
  __device__ __forceinline__ void run_blocks() const {
#pragma unroll 1
    for (int block = 0; block < plan.blocks; ++block) {
      if (block > 0) {
        __syncthreads();
        this->copy_block(block);
      }
      run_block<kFolded>(block);
      if constexpr (Group::kHasSums)
        if (plan.blocks > 1) add_tables(block);
    }
  }

  // ---- What a share leaves behind ----

  __device__ __forceinline__ int share() const { return gpu::shared_memory<Progress>()->share; }

  __device__ __forceinline__ void clear_sums() const {
    const int warps = plan.warps;
    if (plan.table_floats)
      for (int i = thread_of_block(); i < warps * plan.table_floats; i += blockDim.x) table(0)[i] = 0.0f;
    if (arguments.pad_gradient)
      for (int i = thread_of_block(); i < warps * 2 * kDim; i += blockDim.x) pad(0)[i] = 0.0f;
  }

  // Adds the warps' sums of the table, in the order of the warps, to the share's, and clears them.
  __device__ __forceinline__ void add_tables(int block) const {
    if (!plan.table_floats) return;
    __syncthreads();
    const bool first = plan.blocks == 1 || (block == 0 && gpu::shared_memory<Progress>()->first);
    float* part = arguments.table_parts + (int64_t(share()) * arguments.call.heads + group.head()) * group.table_rows();
    for (int row = thread_of_block(); row < group.table_rows(); row += blockDim.x) {
      float sum = 0.0f;
      for (int w = 0; w < plan.warps; ++w) {
        const int count = warp_count(block, w);
        if (count == 0) break;
        const int i =
            kSpareRows + row - group.middle_row() + group.bias_offset(block * block_keys() + w * kKeys + count - 1) / 4;
        if (i < 0 || i >= plan.table_floats) continue;
        sum += table(w)[i];
        table(w)[i] = 0.0f;
      }
      part[row] = first ? sum : part[row] + sum;
    }
  }

  __device__ __forceinline__ void write_pads() const {
    if (!arguments.pad_gradient) return;
    const int dim = group.head_dim();
    for (int i = thread_of_block(); i < 3 * dim; i += blockDim.x) {
      float sum = 0.0f;  // of a padding query: nobody sees its context
      if (i >= dim)
        for (int w = 0; w < plan.warps; ++w) sum += pad(w)[(i / dim - 1) * kDim + i % dim];
      arguments.pad_parts[((int64_t(share()) * 3 + i / dim) * arguments.call.heads + group.head()) * dim + i % dim] =
          sum;
    }
  }
};

// What is rare has functions of its own, so that it takes no registers from the rest.
template <class B, class Group>
__device__ __attribute__((noinline)) void scan_rows(const typename B::Arguments& arguments) {
  const Progress* now = gpu::shared_memory<Progress>();
  const Group group(arguments, now->head, now->group);
  B(arguments, group).scan_rows();
}
template <class B, class Group>
__device__ __attribute__((noinline)) void run_exactly(const typename B::Arguments& arguments) {
  const Progress* now = gpu::shared_memory<Progress>();
  const Group group(arguments, now->head, now->group);
  B(arguments, group).template run_blocks<false>();
}

// The group that Progress names.
template <class B, class Group>
__device__ __forceinline__ void run_group(const typename B::Arguments& arguments) {
  const Progress* const now = gpu::shared_memory<Progress>();
  bool moderate = true;
  {
    Group group(arguments, now->head, now->group);
    group.find_rows();
    __syncthreads();
    const B backward(arguments, group);
    backward.copy_block(0);
    if (!arguments.whole_rows) {
      moderate = backward.read_statistics();
    } else if (now->folds) {
      gpu::cp_async_wait<0>();
      __syncthreads();
      moderate = backward.refine_statistics();
    }
  }
  const bool usual = __syncthreads_and(moderate) && now->folds;
  if (usual) {
    Group group(arguments, now->head, now->group);
    B(arguments, group).template run_blocks<true>();
  } else {
    scan_rows<B, Group>(arguments);
    run_exactly<B, Group>(arguments);
  }
}

// A share of the groups of a head, which add to sums of it.
template <class T, int kDim, class Group, int kKeys, int kQueries>
__device__ __forceinline__ void attention_backward(const typename Group::Arguments& arguments) {
  using B = Backward<T, kDim, Group, kKeys, kQueries>;
  const BackwardPlan& plan = arguments.backward;
  Progress* const now = gpu::shared_memory<Progress>();
  {
    const Progress start = first_progress(arguments);
    Group group(arguments, start.head, start.group);
    B(arguments, group).clear_sums();
    const bool folds = __syncthreads_and(group.load_bias());
    if (threadIdx.x == 0) {
      *now = start;
      now->folds = folds && (plan.table_floats == 0 || plan.table_is_shared);
    }
  }
  __syncthreads();
  while (now->group < now->end) {
    run_group<B, Group>(arguments);
    __syncthreads();
    if (threadIdx.x == 0) ++now->group, now->first = false;
    __syncthreads();
  }
  Group group(arguments, now->head, now->group - 1);
  const B backward(arguments, group);
  if (plan.blocks == 1) backward.add_tables(0);
  backward.write_pads();
}

// A group that adds to nothing.
template <class T, int kDim, class Group, int kKeys, int kQueries>
__device__ __forceinline__ void attention_backward_of_group(const typename Group::Arguments& arguments) {
  if (threadIdx.x == 0) {
    Progress now{};
    now.head = arguments.heads.remainder(int(blockIdx.x)), now.group = arguments.heads.quotient(int(blockIdx.x));
    now.folds = arguments.folds;
    *gpu::shared_memory<Progress>() = now;
  }
  __syncthreads();
  run_group<Backward<T, kDim, Group, kKeys, kQueries>, Group>(arguments);
}

}  // namespace vidattn::cuda
