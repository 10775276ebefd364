// The backward pass of sequences whose keys come at once: a block of threads walks over sequences of any head. While it
// is at one, the keys and values of the next come into the other half of their shared memory, rows by rows with the
// queries, so that it waits for them once.
//
// Delta is found tile by tile, from rows of the context that come with the queries.
#pragma once
#include "backward.cuh"
#include "sequences.cuh"

namespace vidattn::cuda {

// A sequence of the backward pass: the one that Progress names, or another one in its round of the block.
class SequenceGradientGroup : public SequenceGroup {
 public:
  __device__ __forceinline__ SequenceGradientGroup(const SequenceArguments& arguments, int head, int group)
      : SequenceGradientGroup(arguments, head, group, gpu::shared_memory<Progress>()->round) {}
  __device__ __forceinline__ SequenceGradientGroup(const SequenceArguments& arguments, int head, int group, int round)
      : SequenceGroup(arguments, head, group, arguments.bases + round % 2 * int(kSequenceBytes)), round_(round) {}

  // How far from the place of keys and values those of this round lie.
  __device__ __forceinline__ int half() const { return round_ % 2 * a_.backward.half; }
  // Tiles of queries take turns, without a break between rounds.
  __device__ __forceinline__ int first_stage() const { return round_ * ((keys() + 31) / 32) % 2; }

 private:
  int round_;
};

template <class T, int kDim>
struct SequenceBackward : Backward<T, kDim, SequenceGradientGroup, 32, 32> {
  using Base = Backward<T, kDim, SequenceGradientGroup, 32, 32>;
  using Base::arguments, Base::plan, Base::group, Base::warp, Base::lane;
  using Base::at, Base::key, Base::queries, Base::records, Base::slots, Base::stage_of, Base::warp_count;
  using typename Base::Layout, typename Base::Sums;
  static constexpr int kQueries = 32;

  using Base::Base;

  __device__ __forceinline__ unsigned char* contexts(int query) const {
    return at(plan.contexts + stage_of(query) * kQueries * Layout::kBytes);
  }
  __device__ __forceinline__ float* log_sums() const {
    return reinterpret_cast<float*>(at(plan.log_sums)) + (group.half() ? slots() : 0);
  }

  // ---- Copies ----

  __device__ __forceinline__ void copy_tile(int query) const {
    const int count = group.keys() - query, stage = stage_of(query);
    copy_rows<kDim>(group, kQ, kDout, query, count, kQueries, queries(stage, 0), queries(stage, 1), thread_of_block());
    if (!arguments.whole_rows) copy_rows<kDim>(group, kOut, query, count, kQueries, contexts(query), thread_of_block());
  }
  // Some keys and values, zeros behind the last one, and the log-sum-exp of as many queries.
  __device__ __forceinline__ void copy_keys(int first, int rows) const {
    unsigned char *k = at(this->keys_place() + first * Layout::kBytes),
                  *v = at(this->values_place() + first * Layout::kBytes);
    copy_rows<kDim>(group, kK, kV, first, group.keys() - first, rows, k, v, thread_of_block());
    for (int n = first + thread_of_block(); n < min(first + rows, group.keys()); n += blockDim.x)
      gpu::cp_async_4(gpu::shared_address(log_sums() + n), group.lse(n), true);
  }
  // All that a sequence begins with.
  __device__ __forceinline__ void start() const {
    copy_keys(0, plan.rows);
    copy_tile(0);
    gpu::cp_async_commit();
  }

  // ---- Statistics of the rows of scores ----

  // Returns whether this thread met moderate numbers only.
  __device__ __forceinline__ bool read_log_sums() const {
    bool moderate = true;
    for (int n = thread_of_block(); n < slots(); n += blockDim.x) {
      const float log_sum = n < group.keys() ? log_sums()[n] * kLog2e : plus_infinity();
      moderate &= n >= group.keys() || fabsf(log_sum) <= kLargestLogSum;
      records()[n].log_sum = log_sum;
    }
    return moderate;
  }
  // Delta of a tile of queries, four threads a row.
  __device__ __forceinline__ void find_deltas(int query) const {
    const unsigned char *gradients = queries(stage_of(query), 1), *out = contexts(query);
    for (int row = thread_of_block() / 4; row < kQueries; row += blockDim.x / 4) {
      float sum = 0.0f;
#pragma unroll
      for (int piece = 0; piece < Layout::kPieces; piece += 4) {
        const uint32_t place = Layout::place(row, piece + lane % 4);
        const uint4 x = *reinterpret_cast<const uint4*>(gradients + place);
        const uint4 y = *reinterpret_cast<const uint4*>(out + place);
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

  // A tile of queries meets the keys of this warp, of which there are `count`.
  __device__ __forceinline__ void meet(Sums& sums, int count, int query) const {
    const uint32_t biases[Base::kTiles][2] = {};
    if (count == 32)
      Base::template meet_queries<Way::kPlain>(sums, 0, biases, 0, count, query);
    else if (count > 16)
      Base::template meet_queries<Way::kMasked>(sums, 0, biases, 0, count, query);
    else if (count > 0)
      Base::template meet_queries<Way::kMasked, 1>(sums, 0, biases, 0, count, query);
  }

  // This warp's parts of dq of a tile.
  __device__ __forceinline__ void sum_parts(int query) const {
#pragma unroll 1
    for (int job = 0; job < Base::kJobs; ++job)
      if (plan.job_warps[job] == thread_of_block() / 32) Base::sum_queries(0, query, job);
  }
};

template <class T, int kDim>
__device__ __forceinline__ void walk_over_sequences(const SequenceArguments& arguments) {
  using Group = SequenceGradientGroup;
  using B = SequenceBackward<T, kDim>;
  Progress* const now = gpu::shared_memory<Progress>();
  // A block's tasks, each a sequence and head, lie a grid apart. Here a task is a share.
  const auto enter = [&](int task, int round) {
    if (threadIdx.x != 0) return;
    now->head = arguments.heads.remainder(task), now->group = arguments.heads.quotient(task);
    now->share = task, now->round = round;
  };
  const auto next_task = [&] { return now->share + int(gridDim.x); };
  const auto has_next = [&] { return next_task() < arguments.tasks; };
  const auto next_group = [&] {
    const int task = next_task();
    return Group(arguments, arguments.heads.remainder(task), arguments.heads.quotient(task), now->round + 1);
  };
  // Made anew wherever it is asked for: it would take registers in between.
  const auto current = [&] { return Group(arguments, now->head, now->group); };
  enter(int(blockIdx.x), 0);
  __syncthreads();
  {
    const Group group = current();
    group.find_rows();
    __syncthreads();
    B(arguments, group).start();
  }
#pragma unroll 1
  for (;;) {
    gpu::cp_async_wait<0>();
    __syncthreads();
    bool moderate;
    {
      const Group group = current();
      const B backward(arguments, group);
      if (arguments.whole_rows) {
        moderate = backward.refine_statistics();
      } else {
        moderate = backward.read_log_sums();
        backward.find_deltas(0);
      }
      if (has_next()) next_group().find_rows();
    }
    if (__syncthreads_and(moderate) && arguments.folds) {
      typename B::Sums sums;
      sums.reset();
#pragma unroll 1
      for (int query = 0; query < arguments.keys; query += B::kQueries) {
        const bool is_last = query + B::kQueries >= arguments.keys;
        if (!is_last) {
          const Group group = current();
          B(arguments, group).copy_tile(query + B::kQueries);
        }
        if (has_next()) {
          const Group next = next_group();
          const B backward(arguments, next);
          if (is_last) backward.copy_tile(0);
          backward.copy_keys(query, B::kQueries);
        }
        gpu::cp_async_commit();
        {
          const Group group = current();
          const B backward(arguments, group);
          backward.meet(sums, backward.warp_count(0, backward.warp), query);
        }
        gpu::cp_async_wait<0>();
        __syncthreads();
        {
          const Group group = current();
          const B backward(arguments, group);
          backward.sum_parts(query);
          if (!arguments.whole_rows && !is_last) backward.find_deltas(query + B::kQueries);
        }
        __syncthreads();
      }
      const Group group = current();
      const B backward(arguments, group);
      if (backward.warp_count(0, backward.warp) > 0) backward.stage_keys(sums, 0);
    } else {
      scan_rows<B, Group>(arguments);
      run_exactly<B, Group>(arguments);
      __syncthreads();
      if (has_next()) {
        const Group next = next_group();
        B(arguments, next).start();
      }
    }
    if (!has_next()) break;
    const int task = next_task(), round = now->round + 1;
    __syncthreads();
    enter(task, round);
    __syncthreads();
  }
}

}  // namespace vidattn::cuda
