// softmax(scale * Q K^T + added) V of one group and one head, by one block of threads.
//
// Keys and values come into shared memory once (or block by block, where they do not fit); a warp takes 16 queries at a
// time and walks over the keys with a running maximum, so that nothing of size N x N exists. A family's Group says
// where rows lie and what is added to a score.
//
// There are two ways to a weight:
//   folded  what is added, divided by the scale, is the C operand of the product Q K^T, and the weight is
//           2^(s * c - m) with c = scale * log2 e: one multiply-add. Needs a positive scale and moderate numbers, which
//           the warp checks on the way; if they are not, it does its queries again the other way.
//   exact   each step as the reference does it, for numbers of any size.
#pragma once
#include "rows.cuh"

namespace vidattn::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.4028234663852886e38f;
constexpr float kSlack = 8.0f;             // a maximum that is too small by up to this many powers of two is kept
constexpr float kLargestFolded = 4194304;  // 2^22: beyond, the rounding of a row's maximum shows in its weights
constexpr int kChunk = 64;                 // keys whose scores a warp has at a time

__device__ __forceinline__ float minus_infinity() {
  return __int_as_float(int(0xff800000));
}

// What a warp knows of 16 queries. A lane has two rows, lane / 4 and 8 more.
template <int kDim>
struct QueryState {
  float out[kDim / 8][4];
  float sum[2];
  float top[2];  // folded: in powers of two; exact: a score
  bool seen[2];  // whether a finite score was met

  __device__ __forceinline__ void reset(float start) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
    sum[0] = sum[1] = 0.0f;
    top[0] = top[1] = start;
    seen[0] = seen[1] = false;
  }

  __device__ __forceinline__ void shrink(int half, float factor) {
    sum[half] *= factor;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) out[n][2 * half] *= factor, out[n][2 * half + 1] *= factor;
  }
};

__device__ __forceinline__ float maximum_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

template <class T, int kDim, class Group>
struct Forward {
  using Layout = Rows<kDim>;
  using State = QueryState<kDim>;
  static constexpr int kTiles = kChunk / 8;  // of 8 keys

  const Group& group;
  const uint32_t k_shared, v_shared;

  // scores[n] = Q K^T of 8 keys from row `first` + 8 n of the shared memory on, plus what stands there.
  __device__ __forceinline__ void add_products(float (&scores)[kTiles][4], const uint32_t (&q)[kDim / 16][4], int first,
                                               int tiles) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n >= tiles) break;
#pragma unroll
      for (int part = 0; part < kDim / 32; ++part) {
        uint32_t k[4];
        gpu::ldmatrix(k, k_shared + Layout::place(first + n * 8 + lane % 8, part * 4 + lane / 8));
        gpu::mma_16x8x16<T>(scores[n], q[2 * part], k[0], k[1], scores[n]);
        gpu::mma_16x8x16<T>(scores[n], q[2 * part + 1], k[2], k[3], scores[n]);
      }
    }
  }

  // out += weights V for keys from row `first` on. Rows behind the last key hold zeros.
  __device__ __forceinline__ void add_values(State& state, const float (&weights)[kTiles][4], int first,
                                             int tiles) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kTiles / 2; ++j) {
      if (2 * j >= tiles) break;
      const uint32_t p[4] = {gpu::pack<T>(weights[2 * j][0], weights[2 * j][1]),
                             gpu::pack<T>(weights[2 * j][2], weights[2 * j][3]),
                             gpu::pack<T>(weights[2 * j + 1][0], weights[2 * j + 1][1]),
                             gpu::pack<T>(weights[2 * j + 1][2], weights[2 * j + 1][3])};
#pragma unroll
      for (int part = 0; part < kDim / 16; ++part) {
        uint32_t v[4];
        gpu::ldmatrix_transposed(v, v_shared + Layout::place(first + j * 16 + lane % 16, 2 * part + lane / 16));
        gpu::mma_16x8x16<T>(state.out[2 * part], p, v[0], v[1], state.out[2 * part]);
        gpu::mma_16x8x16<T>(state.out[2 * part + 1], p, v[2], v[3], state.out[2 * part + 1]);
      }
    }
  }

  // Keys [key, key + kChunk) of the group, which lie from row `first` of the shared memory on. kTail: only `count` of
  // them are keys. Returns false if the numbers are too large for this way.
  template <bool kFolded, bool kTail>
  __device__ __forceinline__ bool chunk(State& state, const uint32_t (&q)[kDim / 16][4],
                                        const typename Group::Query (&query)[2], int key, int first, int count) const {
    const int column = threadIdx.x % 4 * 2;
    const int tiles = kTail ? (count + 15) / 16 * 2 : kTiles;
    float s[kTiles][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
      if (kFolded && (!kTail || n * 8 < count)) group.folded(s[n], query, key + n * 8 + column);
    }
    add_products(s, q, first, tiles);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (!kFolded && (!kTail || n * 8 < count)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = n * 8 + column + i % 2;
          if (!kTail || j < count) s[n][i] = group.exact(s[n][i], query[i / 2], key + j);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (kTail && n * 8 + column + i % 2 >= count) s[n][i] = minus_infinity();
    }

    const float factor = kFolded ? group.factor() : 1.0f;
    float largest[2] = {s[0][0], s[0][2]};
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)  // behind the last key all are -inf
        largest[half] = fmaxf(largest[half], fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    bool grows = false;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      grows |= kFolded ? fmaf(largest[half], factor, -state.top[half]) > kSlack || !state.seen[half]
                       : largest[half] > state.top[half] + kSlack * kLn2;
    if (__any_sync(~0u, grows)) {
      bool large = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float found = maximum_of_quad(largest[half]) * factor;
        if (kFolded) {
          // The start, 0, is no score: it gives way to the first finite one, whatever that is.
          if (found > minus_infinity()) {
            const float top = state.seen[half] ? fmaxf(state.top[half], found) : found;
            state.shrink(half, state.seen[half] ? gpu::exp2_approx(state.top[half] - top) : 0.0f);
            state.top[half] = top;
            state.seen[half] = true;
            large |= !(fabsf(top) <= kLargestFolded);
          }
        } else {
          const float top = fmaxf(state.top[half], found);
          state.shrink(half, gpu::exp2_approx((state.top[half] - top) * kLog2e));
          state.top[half] = top;
        }
      }
      if (kFolded && __any_sync(~0u, large)) return false;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (kTail && n >= tiles) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float top = state.top[i / 2];
        s[n][i] = gpu::exp2_approx(kFolded ? fmaf(s[n][i], factor, -top) : (s[n][i] - top) * kLog2e);
        state.sum[i / 2] += s[n][i];
      }
    }
    add_values(state, s, first, tiles);
    return true;
  }

  // All keys [key, key + keys) of a block, which lie from row 0 of the shared memory on.
  template <bool kFolded>
  __device__ __forceinline__ bool block(State& state, const uint32_t (&q)[kDim / 16][4],
                                        const typename Group::Query (&query)[2], int key, int keys) const {
    int first = 0;
#pragma unroll 1
    for (; first + kChunk <= keys; first += kChunk)
      if (!chunk<kFolded, false>(state, q, query, key + first, first, kChunk)) return false;
    return first == keys || chunk<kFolded, true>(state, q, query, key + first, first, keys - first);
  }
};

// Divides by the sums and writes the rows that are queries, with their log-sum-exp.
template <class T, int kDim, class Group>
__device__ __forceinline__ void write_rows(const Group& group, QueryState<kDim>& state, int row, bool folded) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.sum[half] += __shfl_xor_sync(~0u, state.sum[half], 1);
    state.sum[half] += __shfl_xor_sync(~0u, state.sum[half], 2);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = state.sum[half];
    const int64_t token = group.output_row(row + 8 * half);
    if (token < 0) continue;
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // no key at all: zeros
    T* out = group.template output<T>(token);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int at = n * 8 + column;
      const uint32_t pair = gpu::pack<T>(state.out[n][2 * half] * inverse, state.out[n][2 * half + 1] * inverse);
      if (at + 1 < group.head_dim() && group.pairs_aligned()) {
        *reinterpret_cast<uint32_t*>(out + at) = pair;
      } else {
        uint16_t* element = reinterpret_cast<uint16_t*>(out + at);
        if (at < group.head_dim()) element[0] = uint16_t(pair);
        if (at + 1 < group.head_dim()) element[1] = uint16_t(pair >> 16);
      }
    }
    if (column == 0)
      *group.lse(token) =
          sum == 0.0f ? minus_infinity() : (folded ? state.top[half] * kLn2 : state.top[half]) + logf(sum);
  }
}

// Copies keys and values [key, key + rows) of the group to row 0 of the shared memory; rows behind the last key are 0.
template <int kDim, class Group>
__device__ __forceinline__ void copy_keys(const Group& group, unsigned char* k_shared, unsigned char* v_shared, int key,
                                          int rows) {
  using Layout = Rows<kDim>;
  for (int i = threadIdx.x; i < rows * Layout::kPieces; i += blockDim.x) {
    const int row = i / Layout::kPieces, piece = i % Layout::kPieces;
    const uint32_t place = Layout::place(row, piece);
    copy_piece(k_shared, place, group.key(key + row), piece, group.head_dim(), group.unit(), group.readable());
    copy_piece(v_shared, place, group.value(key + row), piece, group.head_dim(), group.unit(), group.readable());
  }
  gpu::cp_async_commit();
}

template <class T, int kDim, class Group>
__global__ void __launch_bounds__(256, 2) attention_forward(const typename Group::Arguments arguments) {
  unsigned char* shared = gpu::shared_memory<unsigned char>();
  const int block_keys = arguments.plan.block_keys;
  unsigned char* k_shared = shared;
  unsigned char* v_shared = shared + block_keys * Rows<kDim>::kBytes;
  Group group(arguments, v_shared + block_keys * Rows<kDim>::kBytes);
  group.find_rows();
  __syncthreads();
  const int keys = group.keys(), padded_keys = (keys + 15) / 16 * 16;
  const bool resident = block_keys >= padded_keys;
  if (resident) copy_keys<kDim>(group, k_shared, v_shared, 0, padded_keys);
  const bool folds = __syncthreads_and(group.load_bias());
  gpu::cp_async_wait<0>();
  __syncthreads();

  const Forward<T, kDim, Group> forward{group, gpu::shared_address(k_shared), gpu::shared_address(v_shared)};
  const int lane = threadIdx.x % 32, rows_at_once = blockDim.x / 2;
  for (int pass = 0; pass < keys; pass += rows_at_once) {
    const int row0 = pass + int(threadIdx.x) / 32 * 16, row = row0 + lane / 4;
    const bool active = row0 < keys;
    uint32_t q[kDim / 16][4];
    QueryState<kDim> state;
    typename Group::Query query[2];
    if (active) {
      load_queries<kDim>(q, group.query(row), group.query(row + 8), group.head_dim(), group.query_unit());
      query[0] = group.describe(row), query[1] = group.describe(row + 8);
    }
    bool done = false;
    for (int way = folds ? 0 : 1; way < 2; ++way) {
      if (active && !done) state.reset(way == 0 ? 0.0f : kLowest);
      bool moderate = true;
      for (int key = 0; key < keys; key += block_keys) {
        const int rest = min(keys - key, block_keys);
        if (!resident) {
          __syncthreads();
          copy_keys<kDim>(group, k_shared, v_shared, key, (rest + 15) / 16 * 16);
          gpu::cp_async_wait<0>();
          __syncthreads();
        }
        if (active && !done && moderate)
          moderate = way == 0 ? forward.template block<true>(state, q, query, key, rest)
                              : forward.template block<false>(state, q, query, key, rest);
      }
      if (active && !done && moderate) {
        write_rows<T, kDim>(group, state, row, way == 0);
        done = true;
      }
      if (resident ? done || !active : __syncthreads_and(done || !active)) break;
    }
  }
}

}  // namespace vidattn::cuda
