// The backward pass of short windows, by one block of threads: all queries meet all keys at once.
//
// A warp owns 16 keys, and goes over all queries without a loop. So the sums of dS for each pair of a key and a query,
// over all windows of a share, stay in its registers: they go to the rows of the bias table once, at the end. Of up to
// 64 tokens, P and dP are in registers too, so that delta comes from all scores before dS is made of it.
#pragma once
#include "backward.cuh"

namespace vidattn::cuda {

template <class T, int kDim, class Group, int kTokens>
struct ShortWindowBackward : Backward<T, kDim, Group, 16, kTokens> {
  using Base = Backward<T, kDim, Group, 16, kTokens>;
  using Base::arguments, Base::plan, Base::group, Base::warp, Base::lane;
  using Base::at, Base::key, Base::records, Base::slots, Base::warp_count;
  using typename Base::Arguments, typename Base::Layout, typename Base::Sums;
  static constexpr int kEights = kTokens / 8, kArea = kTokens * Layout::kBytes;
  static constexpr bool kWholeRows = kTokens <= kWholeRowTokens;
  static constexpr int kScoreBytes = 2 * kTokens + 16;  // of dS of a key: eight lie in different banks

  // Of dS, for this lane's keys lane / 4 and 8 more, and its two queries of each eight.
  struct Pairs {
    float sum[kEights][4];

    __device__ __forceinline__ void reset() {
#pragma unroll
      for (int e = 0; e < kEights; ++e) sum[e][0] = sum[e][1] = sum[e][2] = sum[e][3] = 0.0f;
    }
  };

  using Base::Base;

  __device__ __forceinline__ uint32_t address(int place) const { return gpu::shared_address(at(place)); }
  // Of this lane's queries of an eight: a record each.
  __device__ __forceinline__ uint32_t records_of(int eight) const {
    return address(plan.records) + (8 * eight + lane % 4 * 2) * int(sizeof(QueryRecord));
  }
  __device__ __forceinline__ bool has(int eight) const { return 8 * eight < group.keys(); }

  // Behind the bias: what keys that only fill up a tile read, with any query.
  __device__ __forceinline__ void hide_fillers() const {
    for (int i = plan.hidden_bias + thread_of_block(); i < plan.bias_floats; i += blockDim.x)
      group.bias()[i] = kNoWeight;
  }
  __device__ __forceinline__ uint32_t key_bias(int n) const {
    return n < group.keys() ? group.key_bias(n) : gpu::shared_address(group.bias() + plan.hidden_bias);
  }

  // The log-sum-exp that the forward pass saved. Returns whether this thread met moderate numbers only.
  __device__ __forceinline__ bool read_log_sums() const {
    bool moderate = true;
    for (int n = thread_of_block(); n < slots(); n += blockDim.x) {
      const int token = group.token(n);
      const float log_sum = token >= 0 ? *group.lse(token) * kLog2e : 0.0f;
      moderate &= fabsf(log_sum) <= kLargestLogSum;
      this->write_record(n, token >= 0 ? log_sum : plus_infinity(), 0.0f);
    }
    return moderate;
  }

  // The A operand of this warp's rows of an area.
  __device__ __forceinline__ void load_rows(uint32_t (&a)[kDim / 16][4], int area) const {
#pragma unroll
    for (int part = 0; part < kDim / 16; ++part)
      gpu::ldmatrix(a[part], address(area) + Layout::place(16 * warp + lane % 16, 2 * part + lane / 16));
  }
  // Rows of keys, and where the addresses of their bias start.
  struct Keys {
    uint32_t k[kDim / 16][4], bias[2];
    int region[2];  // masked
  };

  // c += the keys' rows times the transposed ones of eight queries.
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&keys)[kDim / 16][4], uint32_t rows) {
#pragma unroll
    for (int part = 0; part < kDim / 32; ++part) {
      uint32_t b[4];
      gpu::ldmatrix(b, rows ^ 64 * part);
      gpu::mma_16x8x16<T>(c, keys[2 * part], b[0], b[1], c);
      gpu::mma_16x8x16<T>(c, keys[2 * part + 1], b[2], b[3], c);
    }
  }

  // P and dP of eight queries. Returns minus delta of this lane's, where it is known.
  template <Way kWay>
  __device__ __forceinline__ float2 meet(float (&p)[4], float (&dp)[4], const Keys& keys,
                                         const uint32_t (&values)[kDim / 16][4], int eight) const {
    const float4 first = gpu::load_shared<float4>(records_of(eight));
    const float4 second = gpu::load_shared<float4>(records_of(eight) + int(sizeof(QueryRecord)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4& query = i % 2 ? second : first;
      p[i] = kWay == Way::kExact ? 0.0f : group.bias_at(keys.bias[i / 2], __float_as_int(query.z));
      if (kWay == Way::kMasked && keys.region[i / 2] != __float_as_int(query.w)) p[i] += group.mask_added();
      dp[i] = 0.0f;
    }
    const uint32_t rows = address(plan.queries) + Layout::place(lane % 8, lane / 8) + 8 * eight * Layout::kBytes;
    multiply(p, keys.k, rows);
    multiply(dp, values, rows + kArea);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4& query = i % 2 ? second : first;
      if (kWay == Way::kExact) {
        const int n = key(0) + lane / 4 + i / 2 * 8;
        const float score = group.exact(p[i], 8 * eight + lane % 4 * 2 + i % 2, min(n, group.keys() - 1));
        p[i] = n < group.keys() ? gpu::exp2_approx((score - query.z) * kLog2e - query.x) : 0.0f;
      } else {
        p[i] = gpu::exp2_approx(fmaf(p[i], group.factor(), -query.x));
      }
    }
    return make_float2(first.y, second.y);
  }

  // Makes dS of P and dP of 16 queries, and adds what follows from both.
  __device__ __forceinline__ void finish(float (&p)[2][4], float (&dp)[2][4], const float2 (&minus_delta)[2],
                                         Sums& sums, Pairs& pairs, int step) const {
    uint32_t p_packed[4], ds_packed[4];
    const uint32_t to = address(plan.scores) + (16 * warp + lane / 4) * kScoreBytes + 32 * step + lane % 4 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // a difference of equals is 0, as delta was no part of the product
        dp[half][i] = p[half][i] * (dp[half][i] + (i % 2 ? minus_delta[half].y : minus_delta[half].x));
        pairs.sum[2 * step + half][i] += dp[half][i];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        p_packed[2 * half + i] = gpu::pack<T>(p[half][2 * i], p[half][2 * i + 1]);
        ds_packed[2 * half + i] = gpu::pack<T>(dp[half][2 * i], dp[half][2 * i + 1]);
        gpu::store_shared(to + 16 * half + 8 * i * kScoreBytes, ds_packed[2 * half + i]);
      }
    }
    const uint32_t rows = address(plan.queries) + Layout::place(lane % 16, lane / 16) + 16 * step * Layout::kBytes;
#pragma unroll
    for (int part = 0; part < kDim / 16; ++part) {
      uint32_t q[4], g[4];
      gpu::ldmatrix_transposed(g, (rows + kArea) ^ 32 * part);
      gpu::ldmatrix_transposed(q, rows ^ 32 * part);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float (&dv)[4] = sums.dv[0][2 * part + i], (&dk)[4] = sums.dk[0][2 * part + i];
        gpu::mma_16x8x16<T>(dv, p_packed, g[2 * i], g[2 * i + 1], dv);
        gpu::mma_16x8x16<T>(dk, ds_packed, q[2 * i], q[2 * i + 1], dk);
      }
    }
  }

  // Of twice so many sums, lanes that differ in one bit of their number share out those of both. Returns the first one
  // that stays.
  template <int kCount>
  __device__ __forceinline__ int halve(float (&sums)[kEights][4], int bit) const {
    const bool upper = lane & bit;
#pragma unroll
    for (int e = 0; e < kCount; ++e)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float other = __shfl_xor_sync(~0u, upper ? sums[e][i] : sums[kCount + e][i], bit);
        sums[e][i] = (upper ? sums[kCount + e][i] : sums[e][i]) + other;
      }
    return upper ? kCount : 0;
  }

  // Sums over all keys of P and P dP, for each query: then its weights have a sum of 1, and delta the same weights and
  // products as dS. It is divided by the sum, not multiplied: where one key has all the weight, dS is exactly 0. The
  // record gets 1 / sum of P in the place of the log-sum-exp. Returns whether all is moderate.
  __device__ __forceinline__ bool refine(const float (&p)[kEights][4], const float (&dp)[kEights][4]) const {
    float sums[kEights][4];  // of this lane's keys: P of its two queries, P dP of these
#pragma unroll
    for (int e = 0; e < kEights; ++e)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[e][i] = p[e][i] + p[e][2 + i];
        sums[e][2 + i] = fmaf(p[e][i], dp[e][i], p[e][2 + i] * dp[e][2 + i]);
      }
    // Each lane of the eight that have the same queries gives half of the eights away, until one is left to it: to a
    // neighbour last, so that neighbours write to other banks.
    static_assert(!kWholeRows || kEights == 8);
    const int mine = halve<4>(sums, 16) + halve<2>(sums, 8) + halve<1>(sums, 4);
    const float4* parts = reinterpret_cast<const float4*>(at(plan.scores));  // of warps, eights and pairs of queries
    gpu::store_shared(gpu::shared_address(&parts[(warp * kEights + mine) * 4 + lane % 4]),
                      make_float4(sums[0][0], sums[0][1], sums[0][2], sums[0][3]));
    __syncthreads();
    bool moderate = true;
#pragma unroll 1
    for (int n = thread_of_block(); n < slots(); n += blockDim.x) {
      float sum = 0.0f, product = 0.0f;
#pragma unroll
      for (int w = 0; w < kTokens / 16; ++w) {
        if (w >= plan.warps) continue;
        const float* part = reinterpret_cast<const float*>(&parts[w * kEights * 4 + n / 2]) + n % 2;
        sum += part[0], product += part[2];
      }
      const bool real = group.is_real(n);
      moderate &= !real || (sum > 0.5f && sum < 2.0f);
      const float inverse = real ? 1.0f / sum : 0.0f;
      records()[n].log_sum = inverse, records()[n].minus_delta = real ? -product / sum : 0.0f;
    }
    return __syncthreads_and(moderate);
  }

  // dQ of the 16 queries whose numbers are those of this warp's keys.
  __device__ __forceinline__ void sum_queries() const {
    float sum[kDim / 8][4];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
    const uint32_t ds =
        address(plan.scores) + (lane / 16 * 8 + lane % 8) * kScoreBytes + (2 * warp + lane / 8 % 2) * 16;
    const uint32_t rows = address(kKeysPlace) + Layout::place(lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < kEights / 2; ++step) {
      if (!has(2 * step)) continue;
      uint32_t a[4], b[4];
      gpu::ldmatrix_transposed(a, ds + 16 * step * kScoreBytes);
#pragma unroll
      for (int part = 0; part < kDim / 16; ++part) {
        gpu::ldmatrix_transposed(b, (rows ^ 32 * part) + 16 * step * Layout::kBytes);
        gpu::mma_16x8x16<T>(sum[2 * part], a, b[0], b[1], sum[2 * part]);
        gpu::mma_16x8x16<T>(sum[2 * part + 1], a, b[2], b[3], sum[2 * part + 1]);
      }
    }
    stage(plan.queries + kArea, sum, group.scale());
  }

  // Brings gradients of the 16 tokens whose numbers are those of this warp's keys to their rows of an area.
  __device__ __forceinline__ void stage(int area, const float (&sum)[kDim / 8][4], float scale) const {
    const uint32_t rows = address(area) + 16 * warp * Layout::kBytes + lane % 4 * 4;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        gpu::store_shared(rows + Layout::place(lane / 4 + 8 * half, n),
                          gpu::pack<T>(sum[n][2 * half] * scale, sum[n][2 * half + 1] * scale));
  }

  // Writes what has been staged: dQ, dK and dV in the places of dO, Q and V.
  __device__ __forceinline__ void write_rows() const {
    constexpr Slot kGradients[3] = {kDq, kDk, kDv};
    const int areas[3] = {plan.queries + kArea, plan.queries, plan.values};
    const bool plain = group.is_plain(kDq) && group.is_plain(kDk) && group.is_plain(kDv);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < kDim / 16; ++i) {
      const int thread = lane + 32 * i, piece = thread % Layout::kPieces, n = 16 * warp + thread / Layout::kPieces;
      const int token = group.token(n), place = int(Layout::place(n, piece));
      if (token < 0 || piece * 8 >= group.head_dim()) continue;
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const uint4 words = gpu::load_shared<uint4>(address(areas[j]) + place);
        if (plain)
          *reinterpret_cast<uint4*>(const_cast<char*>(group.plain_rows(kGradients[j]).at(token)) + 16 * piece) = words;
        else
          write_piece(group.gradient(kGradients[j], n), piece, group.head_dim(), arguments.gradient_unit, words);
      }
    }
  }

  // Adds the gradients of keys that are padding to the sums of the warp.
  __device__ __forceinline__ void add_padding(const Sums& sums) const {
    const bool padding[2] = {group.token(key(0) + lane / 4) == kPadding,
                             group.token(key(0) + lane / 4 + 8) == kPadding};
    if (!__any_sync(~0u, padding[0] || padding[1])) return;
#pragma unroll
    for (int which = 0; which < 2; ++which)
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float (&of)[4] = (which ? sums.dv : sums.dk)[0][n];
          float sum = (padding[0] ? of[j] : 0.0f) + (padding[1] ? of[2 + j] : 0.0f);
#pragma unroll
          for (int bits = 4; bits < 32; bits *= 2) sum += __shfl_xor_sync(~0u, sum, bits);
          if (lane < 4) this->pad(warp)[which * kDim + n * 8 + lane * 2 + j] += which ? sum : sum * group.scale();
        }
  }

  // All that a window has, which has arrived in shared memory. Returns whether numbers were moderate; if they were not,
  // nothing has been done.
  template <Way kWay>
  __device__ __forceinline__ bool run_window(Pairs& pairs) const {
    Keys keys;
    Sums sums;
    load_rows(keys.k, kKeysPlace);
    for (int half = 0; half < 2; ++half) {
      const int n = key(0) + lane / 4 + 8 * half;
      keys.bias[half] = key_bias(n), keys.region[half] = kWay == Way::kMasked ? group.region(n) : 0;
    }
    if constexpr (kWholeRows && kWay != Way::kExact) {
      float p[kEights][4], dp[kEights][4];
      uint32_t values[kDim / 16][4];
      load_rows(values, plan.values);
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        if (has(e)) {
          meet<kWay>(p[e], dp[e], keys, values, e);
        } else {
          p[e][0] = p[e][1] = p[e][2] = p[e][3] = 0.0f;
          dp[e][0] = dp[e][1] = dp[e][2] = dp[e][3] = 0.0f;
        }
      }
      if (!refine(p, dp)) return false;
      sums.reset();
#pragma unroll
      for (int step = 0; step < kEights / 2; ++step) {
        if (!has(2 * step)) continue;
        float two[2][4], gradients[2][4];
        float2 minus_delta[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int e = 2 * step + half;
          const float2 first = gpu::load_shared<float2>(records_of(e));
          const float2 second = gpu::load_shared<float2>(records_of(e) + int(sizeof(QueryRecord)));
          minus_delta[half] = make_float2(first.y, second.y);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            two[half][i] = p[e][i] * (i % 2 ? second.x : first.x), gradients[half][i] = dp[e][i];
        }
        finish(two, gradients, minus_delta, sums, pairs, step);
      }
    } else {
      uint32_t values[kDim / 16][4];
      load_rows(values, plan.values);
      sums.reset();
#pragma unroll
      for (int step = 0; step < kEights / 2; ++step) {
        if (!has(2 * step)) continue;
        float p[2][4], dp[2][4];
        float2 minus_delta[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          minus_delta[half] = meet<kWay>(p[half], dp[half], keys, values, 2 * step + half);
        finish(p, dp, minus_delta, sums, pairs, step);
      }
    }
    __syncthreads();  // from here on, only K and dS are read
    sum_queries();
    stage(plan.queries, sums.dk[0], group.scale());
    stage(plan.values, sums.dv[0], 1.0f);
    write_rows();
    if (arguments.pad_gradient) add_padding(sums);
    return true;
  }

  // Brings the sums of pairs to the rows of the table. Nobody may need dS any more.
  __device__ __forceinline__ void fold(const Pairs& pairs) const {
    const auto table = this->row_sums(key(0), warp_count(0, warp));
    if (!table.wanted()) return;
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      if (!has(e)) continue;
      table.put(0, pairs.sum[e]);
      table.template add<true>(8 * e);
    }
  }
};

// What is rare has a function of its own, so that it takes no registers from the rest.
template <class B, class Group>
__device__ __attribute__((noinline)) void run_window_exactly(const typename B::Arguments& arguments) {
  const Progress* now = gpu::shared_memory<Progress>();
  const Group group(arguments, now->head, now->group);
  const B backward(arguments, group);
  typename B::Pairs pairs;
  pairs.reset();
  backward.scan_rows();
  __syncthreads();
  backward.template run_window<Way::kExact>(pairs);
  __syncthreads();
  backward.fold(pairs);
}

template <class T, int kDim, class Group, int kTokens>
__device__ __forceinline__ void short_backward(const typename Group::Arguments& arguments) {
  using B = ShortWindowBackward<T, kDim, Group, kTokens>;
  Progress* const now = gpu::shared_memory<Progress>();
  {
    const Progress start = first_progress(arguments);
    Group group(arguments, start.head, start.group);
    const B backward(arguments, group);
    backward.clear_sums();
    const bool folds = __syncthreads_and(group.load_bias());
    backward.hide_fillers();
    if (threadIdx.x == 0) *now = start, now->folds = folds;
  }
  __syncthreads();
#pragma unroll 1
  while (now->group < now->end) {
    typename B::Pairs pairs;
    pairs.reset();
#pragma unroll 1
    while (now->group < now->end) {
      const Group group(arguments, now->head, now->group);
      group.find_rows();
      __syncthreads();
      const B backward(arguments, group);
      backward.copy_block(0);
      const bool moderate = B::kWholeRows ? backward.read_log_sums() : backward.read_statistics();
      gpu::cp_async_wait<0>();
      bool usual = __syncthreads_and(moderate) && now->folds;
      if (usual) {
        usual = group.masks() ? backward.template run_window<Way::kMasked>(pairs)
                              : backward.template run_window<Way::kPlain>(pairs);
      }
      __syncthreads();
      if (!usual) break;
      if (threadIdx.x == 0) ++now->group;
      __syncthreads();
    }
    {
      const Group group(arguments, now->head, now->end - 1);
      B(arguments, group).fold(pairs);
    }
    if (now->group == now->end) break;
    __syncthreads();
    run_window_exactly<B, Group>(arguments);
    __syncthreads();
    if (threadIdx.x == 0) ++now->group;
    __syncthreads();
  }
  const Group group(arguments, now->head, now->end - 1);
  const B backward(arguments, group);
  backward.add_tables(0);
  backward.write_pads();
}

}  // namespace vidattn::cuda
