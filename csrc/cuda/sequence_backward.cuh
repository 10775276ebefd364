// The backward pass of sequences whose keys come at once: a block of threads walks over sequences of any head, tile by
// tile of queries, without a break between sequences. While one tile meets the keys, dq of the tile before is summed,
// delta of the tile behind is found, and the tile behind that one is on its way, and with it keys and values of the
// next sequence. So there is one barrier a tile, and all warps have something to do in between.
#pragma once
#include "backward.cuh"
#include "sequences.cuh"

namespace vidattn::cuda {

// The one sequence of a block.
class SequenceGradientGroup : public SequenceGroup {
 public:
  static constexpr int kStages = 2;
  __device__ __forceinline__ SequenceGradientGroup(const SequenceArguments& arguments, int head, int group)
      : SequenceGroup(arguments, head, group, arguments.bases) {}
  static constexpr __device__ int half() { return 0; }
  static constexpr __device__ int records() { return 0; }
  static constexpr __device__ int turn() { return 0; }
};

// A sequence of a block that walks: that of a round, or the one that Progress names. A block's tasks, each a sequence
// and head, lie a grid apart; the share of Progress is the first.
class WalkingGroup : public SequenceGroup {
 public:
  static constexpr int kStages = 3;
  __device__ __forceinline__ WalkingGroup(const SequenceArguments& arguments, int round)
      : WalkingGroup(arguments, arguments.heads.remainder(task_of(round)), arguments.heads.quotient(task_of(round)),
                     round) {}
  __device__ __forceinline__ WalkingGroup(const SequenceArguments& arguments, int head, int group)
      : WalkingGroup(arguments, head, group, gpu::shared_memory<Progress>()->round) {}

  static __device__ __forceinline__ int task_of(int round) {
    return gpu::shared_memory<Progress>()->share + round * int(gridDim.x);
  }
  // Two sequences have keys and values, and records, at a time.
  __device__ __forceinline__ int half() const { return round_ % 2 * a_.backward.half; }
  __device__ __forceinline__ int records() const { return round_ % 2 * a_.slots * int(sizeof(QueryRecord)); }
  __device__ __forceinline__ float* log_sums_place() const {
    return reinterpret_cast<float*>(gpu::shared_memory<unsigned char>() + a_.backward.log_sums) + round_ % 2 * a_.slots;
  }
  // Tiles of queries take turns, without a break between rounds.
  __device__ __forceinline__ int turn() const { return round_ * ((keys() + 31) / 32); }

 private:
  __device__ __forceinline__ WalkingGroup(const SequenceArguments& arguments, int head, int group, int round)
      : SequenceGroup(arguments, head, group, arguments.bases + round % 3 * int(kSequenceBytes)), round_(round) {}

  int round_;
};

template <class T, int kDim>
struct SequenceBackward : Backward<T, kDim, WalkingGroup, 32, 32> {
  using Base = Backward<T, kDim, WalkingGroup, 32, 32>;
  using Base::arguments, Base::plan, Base::group, Base::warp, Base::lane;
  using Base::at, Base::queries, Base::records, Base::slots, Base::stage_of, Base::warp_count;
  using typename Base::Layout, typename Base::Sums;
  static constexpr int kQueries = 32;

  using Base::Base;

  __device__ __forceinline__ unsigned char* contexts(int query) const {
    return at(plan.contexts + (query / kQueries + group.turn()) % 2 * kQueries * Layout::kBytes);
  }

  // ---- Copies, each by one warp ----

  // 32 rows of a tensor, zeros behind the last token.
  __device__ __forceinline__ void copy_rows(Slot slot, int first, unsigned char* to) const {
    const int lane = thread_of_block() % 32;
    if (!group.is_plain(slot)) {
      cuda::copy_rows<kDim>(group, slot, first, group.keys() - first, kQueries, to, lane, 32);
      return;
    }
    constexpr int kStep = 32 / Layout::kPieces;  // rows at a time: 8, or 4, which are every other time in other places
    const auto piece = group.piece(slot, lane % Layout::kPieces);
    const int token = first + lane / Layout::kPieces;
    const uint32_t place = gpu::shared_address(to) + Layout::place(lane / Layout::kPieces, lane % Layout::kPieces);
    const char* from = piece.rows.first + uint64_t(uint32_t(token)) * piece.rows.stride;
#pragma unroll
    for (int row = 0; row < kQueries; row += kStep) {
      const bool apart = row == 0 && token < piece.rows.apart;
      gpu::cp_async_16((place ^ row % 8 * 16) + row * Layout::kBytes, apart ? piece.rows.cls : from,
                       piece.valid && token + row < group.keys());
      from += uint64_t(kStep) * piece.rows.stride;
    }
  }
  // A tile of queries, and what else has its rows.
  __device__ __forceinline__ void copy_tile(int query) const {
    const int stage = stage_of(query);
    copy_rows(kQ, query, queries(stage, 0)), copy_rows(kDout, query, queries(stage, 1));
    if (!arguments.whole_rows) copy_rows(kOut, query, contexts(query));
  }
  // As many keys and values.
  __device__ __forceinline__ void copy_keys(int first) const {
    copy_rows(kK, first, at(this->keys_place() + first * Layout::kBytes));
    copy_rows(kV, first, at(this->values_place() + first * Layout::kBytes));
  }
  __device__ __forceinline__ void copy_log_sums() const {
    for (int n = thread_of_block() % 32; n < group.keys(); n += 32)
      gpu::cp_async_4(gpu::shared_address(group.log_sums_place() + n), group.lse(n), true);
  }
  // All that a sequence begins with, by all warps.
  __device__ __forceinline__ void start() const {
    for (int first = 32 * warp; first < plan.rows; first += 32 * plan.warps) copy_keys(first);
    if (warp == plan.warps - 1) {
      copy_log_sums();
      for (int query = 0; query < min(group.keys(), 2 * kQueries); query += kQueries) copy_tile(query);
    }
    gpu::cp_async_commit();
  }

  // ---- Statistics of the rows of scores ----

  // Returns whether this thread met moderate numbers only.
  __device__ __forceinline__ bool read_log_sums() const {
    bool moderate = true;
    for (int n = thread_of_block(); n < slots(); n += blockDim.x) {
      const float log_sum = n < group.keys() ? group.log_sums_place()[n] * kLog2e : plus_infinity();
      moderate &= n >= group.keys() || fabsf(log_sum) <= kLargestLogSum;
      records()[n].log_sum = log_sum;
    }
    return moderate;
  }
  // Delta of a tile of queries, four threads a row.
  __device__ __forceinline__ void find_deltas(int query) const {
    const uint32_t gradients = gpu::shared_address(queries(stage_of(query), 1));
    const uint32_t out = gpu::shared_address(contexts(query));
    const int swap = Layout::kPieces > 4 ? lane / 4 % 2 * 4 : 0;  // odd rows begin with the other half: no bank twice
    for (int row = thread_of_block() / 4; row < kQueries; row += blockDim.x / 4) {
      float sum = 0.0f;
#pragma unroll
      for (int piece = 0; piece < Layout::kPieces; piece += 4) {
        const uint32_t place = Layout::place(row, (piece + lane % 4) ^ swap);
        const uint4 x = gpu::load_shared<uint4>(gradients + place), y = gpu::load_shared<uint4>(out + place);
        sum += product(x.x, y.x) + product(x.y, y.y) + product(x.z, y.z) + product(x.w, y.w);
      }
      sum = Base::sum_of_quad(sum);
      if (lane % 4 == 0) records()[query + row].minus_delta = -sum;
    }
  }
  static __device__ __forceinline__ float product(uint32_t x, uint32_t y) {
    const float2 a = unpack<T>(x), b = unpack<T>(y);
    return fmaf(a.x, b.x, a.y * b.y);
  }

  // A warp's values as operands, where registers have room for them.
  struct Values {
    uint32_t a[kDim == 64 ? kDim / 16 : 1][2][4];  // (16 elements, 16 keys)
  };
  __device__ __forceinline__ void load_values(Values& v) const {
    if constexpr (kDim == 64) {
      const int thread = thread_of_block(), lane = thread % 32;
      const uint32_t rows = gpu::shared_address(at(this->values_place())) +
                            min(thread / 32, plan.rows / 32 - 1) * 32 * Layout::kBytes +
                            Layout::place(lane % 16, lane / 16);
#pragma unroll
      for (int part = 0; part < kDim / 16; ++part)
#pragma unroll
        for (int t = 0; t < 2; ++t) gpu::ldmatrix(v.a[part][t], (rows ^ 32 * part) + 16 * t * Layout::kBytes);
    }
  }

  // A tile of queries meets the keys of this warp, of which there are `count`.
  __device__ __forceinline__ void meet(Sums& sums, const Values& v, int count, int query) const {
    // With 64 elements, rows of keys that are read serve a whole tile.
    const bool whole = kDim == 64 && query + 16 < group.keys();
    const uint32_t biases[Base::kTiles][2] = {};
    if (count > 16) {
      if (count == 32)
        whole ? meet_tile<Way::kPlain, 2>(sums, v, count, query)
              : Base::template meet_queries<Way::kPlain>(sums, 0, biases, 0, count, query);
      else
        whole ? meet_tile<Way::kMasked, 2>(sums, v, count, query)
              : Base::template meet_queries<Way::kMasked>(sums, 0, biases, 0, count, query);
    } else if (count > 0) {
      whole ? meet_tile<Way::kMasked, 1>(sums, v, count, query)
            : Base::template meet_queries<Way::kMasked, 1>(sums, 0, biases, 0, count, query);
    }
  }

  // What meet_queries does, for 32 queries at a time.
  template <Way kWay, int kUsed>
  __device__ __forceinline__ void meet_tile(Sums& sums, const Values& v, int count, int query) const {
    constexpr int kArea = kQueries * Layout::kBytes;
    const int thread = thread_of_block(), lane = thread % 32;
    const uint32_t start = gpu::shared_address(at(0)), tile = start + plan.queries + 2 * stage_of(query) * kArea;
    const uint32_t keys =
        start + this->keys_place() + thread / 32 * 32 * Layout::kBytes + Layout::place(lane % 16, lane / 16);
    const uint32_t eights = tile + Layout::place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const uint32_t record = start + this->records_place() + (query + lane % 4 * 2) * int(sizeof(QueryRecord));
    const auto of_query = [&](int eight, int i, int field) {
      return gpu::load_shared<float>(record + (8 * eight + i) * int(sizeof(QueryRecord)) + field);
    };
    float p[4][kUsed][4];  // (16 keys, 8 queries)
    multiply_tile(p, eights, [&](uint32_t (&a)[4], int part, int t) {
      gpu::ldmatrix(a, (keys ^ 32 * part) + 16 * t * Layout::kBytes);
    });
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float log_sum = of_query(e, i, int(offsetof(QueryRecord, log_sum)));
#pragma unroll
        for (int t = 0; t < kUsed; ++t)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = p[e][t][2 * half + i];
            x = gpu::exp2_approx(fmaf(x, group.factor(), -log_sum));
            if (kWay != Way::kPlain && 16 * t + lane / 4 + 8 * half >= count) x = 0.0f;  // no key
          }
      }
    uint32_t p_packed[2][kUsed][4], ds_packed[2][kUsed][4];
    const int to = this->scores(query / kQueries) + Base::Scores::place(thread / 32 * 32 + lane / 4, 0) + lane % 4 * 4;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      float ds[2][kUsed][4];
      multiply_tile(ds, eights + kArea + 16 * step * Layout::kBytes, [&](uint32_t (&a)[4], int part, int t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = v.a[part][t][i];
      });
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float minus_delta[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) minus_delta[i] = of_query(2 * step + e, i, int(offsetof(QueryRecord, minus_delta)));
#pragma unroll
        for (int t = 0; t < kUsed; ++t)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float *weights = &p[2 * step + e][t][2 * half], *products = &ds[e][t][2 * half];
            p_packed[step][t][2 * e + half] = gpu::pack<T>(weights[0], weights[1]);
            const uint32_t pair =
                gpu::pack<T>(weights[0] * (products[0] + minus_delta[0]), weights[1] * (products[1] + minus_delta[1]));
            ds_packed[step][t][2 * e + half] = pair;
            *reinterpret_cast<uint32_t*>(at((to ^ 16 * (2 * step + e)) + (16 * t + 8 * half) * Base::Scores::kBytes)) =
                pair;
          }
      }
    }
    const uint32_t rows = tile + Layout::place(lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int part = 0; part < kDim / 16; ++part) {
        uint32_t q[4], g[4];
        gpu::ldmatrix_transposed(g, (rows ^ 32 * part) + 16 * step * Layout::kBytes + kArea);
        gpu::ldmatrix_transposed(q, (rows ^ 32 * part) + 16 * step * Layout::kBytes);
#pragma unroll
        for (int t = 0; t < kUsed; ++t)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float (&dv)[4] = sums.dv[t][2 * part + i], (&dk)[4] = sums.dk[t][2 * part + i];
            gpu::mma_16x8x16<T>(dv, p_packed[step][t], g[2 * i], g[2 * i + 1], dv);
            gpu::mma_16x8x16<T>(dk, ds_packed[step][t], q[2 * i], q[2 * i + 1], dk);
          }
      }
  }

  // Rows of keys, of which load(a, part, t) gives those of an operand, times rows of a tile of queries; the address is
  // of this lane's part of the first two pieces of 16 rows.
  template <int kEights, int kUsed, class Load>
  static __device__ __forceinline__ void multiply_tile(float (&c)[kEights][kUsed][4], uint32_t eights,
                                                       const Load& load) {
#pragma unroll
    for (int e = 0; e < kEights; ++e)
#pragma unroll
      for (int t = 0; t < kUsed; ++t) c[e][t][0] = c[e][t][1] = c[e][t][2] = c[e][t][3] = 0.0f;
#pragma unroll
    for (int part = 0; part < kDim / 16; ++part) {
      uint32_t b[kEights / 2][4];
#pragma unroll
      for (int i = 0; i < kEights / 2; ++i) gpu::ldmatrix(b[i], (eights ^ 32 * part) + 16 * i * Layout::kBytes);
#pragma unroll
      for (int t = 0; t < kUsed; ++t) {
        uint32_t a[4];
        load(a, part, t);
#pragma unroll
        for (int e = 0; e < kEights; ++e)
          gpu::mma_16x8x16<T>(c[e][t], a, b[e / 2][e % 2 * 2], b[e / 2][e % 2 * 2 + 1], c[e][t]);
      }
    }
  }

  // This warp's part of dq of a tile: half of the elements.
  __device__ __forceinline__ void sum_parts(int query) const {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if (plan.job_warps[half] != thread_of_block() / 32) continue;
      if (query + 16 < group.keys())
        sum_half<2>(query, half);
      else
        sum_half<1>(query, half);
    }
  }
  // Goes out by way of shared memory, 16 bytes at a time.
  template <int kSixteens>
  __device__ __forceinline__ void sum_half(int query, int half) const {
    constexpr int kParts = 2 * Base::kPieceJobs;
    float sum[kSixteens][kParts][4];
    Base::sum_half(sum, group.keys(), query, 0, half);
    const int lane = thread_of_block() % 32;
#pragma unroll
    for (int s = 0; s < kSixteens; ++s)
#pragma unroll
      for (int j = 0; j < kParts; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[s][j][i] *= group.scale();
    if (group.is_shared(query) && lane < 4) {
#pragma unroll
      for (int j = 0; j < kParts; ++j)
        group.write_shared(kDq, (half * kParts + j) * 8 + lane * 2, sum[0][j][0], sum[0][j][1]);
    }
    __syncwarp();
    unsigned char* const rows = at(plan.staging);
    const uint32_t to = gpu::shared_address(rows) + Layout::place(lane / 4, half * kParts) + lane % 4 * 4;
#pragma unroll
    for (int s = 0; s < kSixteens; ++s)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < kParts; ++j)
          gpu::store_shared((to ^ 16 * j) + (16 * s + 8 * i) * Layout::kBytes,
                            gpu::pack<T>(sum[s][j][2 * i], sum[s][j][2 * i + 1]));
    __syncwarp();
    group.template write_rows<kDim, kParts>(kDq, query, min(16 * kSixteens, group.keys() - query), half * kParts, rows,
                                            lane);
  }
};

// What a thread keeps from tile to tile is little, as sums and values take nearly all registers: groups are made anew
// wherever they are asked for, and Progress says whether a sequence that nothing hid goes the usual way.
template <class T, int kDim>
__device__ __forceinline__ void walk_over_sequences(const SequenceArguments& arguments) {
  using Group = WalkingGroup;
  using B = SequenceBackward<T, kDim>;
  const BackwardPlan& plan = arguments.backward;
  Progress* const now = gpu::shared_memory<Progress>();
  const auto group_of = [&](int round) { return Group(arguments, int(gpu::keep(uint32_t(round)))); };
  const auto exists = [&](int round) { return Group::task_of(int(gpu::keep(uint32_t(round)))) < arguments.tasks; };
  const auto find_rows = [&](int round) {
    if (exists(round)) group_of(round).find_rows();
  };
  const auto begin = [&](int round) {
    const Group group = group_of(round);
    const B backward(arguments, group);
    backward.start();
    gpu::cp_async_wait<0>();
    __syncthreads();
    if (arguments.whole_rows) return;
    backward.find_deltas(0);
    const bool moderate = __syncthreads_and(backward.read_log_sums());
    if (threadIdx.x == 0) now->folds = moderate;
    __syncthreads();
  };
  if (threadIdx.x == 0) now->share = int(blockIdx.x);
  __syncthreads();
  find_rows(0), find_rows(1);
  __syncthreads();
  begin(0);
  bool behind = false;  // dq of the last tile of the sequence before is to be summed
#pragma unroll 1
  for (int round = 0; exists(round); ++round) {
    bool usual = behind || arguments.whole_rows || now->folds;
    if (arguments.whole_rows) {
      const Group group = group_of(round);
      usual = __syncthreads_and(B(arguments, group).refine_statistics());
    }
    if (!usual || !arguments.folds) {
      find_rows(round + 2);
      __syncthreads();
      if (threadIdx.x == 0) {
        const int task = Group::task_of(round);
        now->head = arguments.heads.remainder(task), now->group = arguments.heads.quotient(task), now->round = round;
      }
      __syncthreads();
      scan_rows<B, Group>(arguments);
      run_exactly<B, Group>(arguments);
      __syncthreads();
      if (exists(round + 1)) begin(round + 1);
      behind = false;
      continue;
    }
    typename B::Sums sums;
    typename B::Values values;
    sums.reset();
    {
      const Group group = group_of(round);
      B(arguments, group).load_values(values);
    }
#pragma unroll 1
    for (int query = 0;; query += B::kQueries) {
      const int left = arguments.keys - query, warp = thread_of_block() / 32;
      if (left > 0) {
        if (warp == plan.warps - 1) {
          // The tile behind the next one; of a single tile, the next one.
          const int ahead = query + (arguments.keys > B::kQueries ? 2 * B::kQueries : B::kQueries);
          if (ahead < arguments.keys) {
            const Group group = group_of(round);
            B(arguments, group).copy_tile(ahead);
          } else if (exists(round + 1)) {
            const Group group = group_of(round + 1);
            B(arguments, group).copy_tile(ahead - arguments.slots);
          }
        }
        // The first tile still needs the keys that were there, if there is another one.
        const int first = arguments.keys > B::kQueries ? B::kQueries : 0;
        if (warp == plan.key_warp && query >= first && exists(round + 1)) {
          const Group group = group_of(round + 1);
          const B backward(arguments, group);
#pragma unroll 1
          for (int n = query == first ? 0 : query; n <= query; n += 32) backward.copy_keys(n);
          if (query == first) backward.copy_log_sums();
        }
        gpu::cp_async_commit();
        const Group group = group_of(round);
        const B backward(arguments, group);
        backward.meet(sums, values, backward.warp_count(0, backward.warp), query);
      }
      if (query > 0 || behind) {
        const Group group = group_of(query > 0 ? round : round - 1);
        B(arguments, group).sum_parts((query > 0 ? query : arguments.slots) - B::kQueries);
      }
      if (!arguments.whole_rows && left > 0) {
        const bool more = left > B::kQueries;
        if (more || exists(round + 1)) {
          const Group group = group_of(more ? round : round + 1);
          B(arguments, group).find_deltas(more ? query + B::kQueries : 0);
        }
      }
      if (left <= 0 || left > B::kQueries) {
        gpu::cp_async_wait<0>();
        __syncthreads();
        if (left > 0) continue;
        behind = false;
        break;
      }
      bool moderate = true;
      if (!arguments.whole_rows && exists(round + 1)) {
        const Group group = group_of(round + 1);
        moderate = B(arguments, group).read_log_sums();
      }
      find_rows(round + 2);
      {
        const Group group = group_of(round);
        const B backward(arguments, group);
        if (backward.warp_count(0, backward.warp) > 0) backward.stage_keys(sums, 0);
      }
      gpu::cp_async_wait<0>();
      moderate = __syncthreads_and(moderate);
      behind = moderate && !arguments.whole_rows && exists(round + 1);
      if (behind) break;
      if (threadIdx.x == 0) now->folds = moderate;
    }
  }
}

}  // namespace vidattn::cuda
