// softmax(scale * Q K^T + added) V of one group and one head, by one block of threads.
//
// Keys and values come into shared memory once (or block by block, where they do not fit); a warp takes 16 queries at a
// time and walks over the keys with a running maximum, so that nothing of size N x N exists. A family's Group says
// where rows lie and what is added to a score.
//
// There are two ways to a weight:
//   folded  what is added, divided by the scale, is the C operand of the product Q K^T, and the weight is
//           2^(s * c - m) with c = scale * log2 e: one multiply-add. Needs a positive scale and moderate numbers; a
//           warp that finds at the end that they were not does its queries again the other way.
//   exact   each step as the reference does it, for numbers of any size.
#pragma once
#include "rows.cuh"

namespace vidattn::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.4028234663852886e38f;
constexpr float kSlack = 8.0f;             // a maximum that is too small by up to this many powers of two is kept
constexpr float kFoldedStart = -1e30f;     // of a row's maximum
constexpr float kLargestFolded = 4194304;  // 2^22: beyond, the rounding of a row's maximum shows in its weights

__device__ __forceinline__ float minus_infinity() {
  return __int_as_float(int(0xff800000));
}

__device__ __forceinline__ float maximum_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// 16 queries of a warp. A lane has two rows, lane / 4 and 8 more: elements 0 and 1 of four are of the one, 2 and 3 of
// the other.
template <int kDim>
struct QueryTile {
  uint32_t q[kDim / 16][4];
  float out[kDim / 8][4];
  float sum[2];
  float top[2];  // what weights are relative to. Folded: in powers of two; exact: a score

  __device__ __forceinline__ void reset(bool folded) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
    sum[0] = sum[1] = 0.0f;
    top[0] = top[1] = folded ? kFoldedStart : kLowest;  // finite, so that a score of -inf has a weight of 0
  }

  // Raises top to the largest score of some keys.
  template <bool kFolded>
  __device__ __forceinline__ void raise(int half, float largest, float factor) {
    const float found = maximum_of_quad(largest), before = top[half];
    top[half] = fmaxf(before, kFolded ? found * factor : found);
    const float shrink = gpu::exp2_approx(kFolded ? before - top[half] : (before - top[half]) * kLog2e);
    sum[half] *= shrink;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) out[n][2 * half] *= shrink, out[n][2 * half + 1] *= shrink;
  }

  // Adds up the sums of the lanes. Returns whether the folded way gave right numbers for all rows of the warp: a sum of
  // 0 comes from -inf alone, or from scores below the start; one that is not finite may come from a top so large that
  // its rounding is a power of two.
  __device__ __forceinline__ bool add_up() {
    bool right = true;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
      right &= sum[half] > 0.0f && sum[half] <= -kLowest && fabsf(top[half]) <= kLargestFolded;
    }
    return __all_sync(~0u, right);
  }
};

// How a warp walks over keys: kQueries tiles of 16 queries, and chunks of kKeys tiles of 8 keys. It has the scores of a
// part of a chunk at a time, as many as fit into its registers.
template <class T, int kDim, class Group, bool kFolded, int kQueries, int kKeys>
struct Walk {
  using Layout = Rows<kDim>;
  using Query = typename Group::Query;
  static constexpr int kChunk = 8 * kKeys, kPart = 4;

  const Group& group;
  const uint32_t k_shared, v_shared;
  const int row;  // the first of this lane

  // Keys [key, key + count) of the group, which lie from row `first` of the shared memory on; kTail: count < kChunk.
  template <bool kMasked, bool kTail>
  __device__ __forceinline__ void chunk(QueryTile<kDim> (&tiles)[kQueries], const Query (&query)[kQueries][2],
                                        const typename Group::Keys& keys, int key, int first, int count) const {
    typename Group::Pairs pairs[kQueries];
    if constexpr (kFolded)
#pragma unroll
      for (int t = 0; t < kQueries; ++t) pairs[t] = group.template pairs<kMasked>(query[t], row + 16 * t, keys);
    part<kMasked, kTail, 0>(tiles, pairs, keys, key, first, count);
    if constexpr (kKeys > kPart)
      if (!kTail || count > 8 * kPart) part<kMasked, kTail, kPart>(tiles, pairs, keys, key, first, count);
  }

  // Rows a multiple of 8 apart have their pieces in the same places, so a lane's address is one of these plus a
  // multiple of 8 rows: for four pieces from `piece` on of 8 rows, and for two pieces of 16.
  static __device__ __forceinline__ uint32_t four_pieces(int piece) {
    const int lane = threadIdx.x % 32;
    return Layout::place(lane % 8, piece + lane / 8);
  }
  static __device__ __forceinline__ uint32_t two_pieces(int piece) {
    const int lane = threadIdx.x % 32;
    return Layout::place(lane % 16, piece + lane / 16);
  }

  template <bool kMasked, bool kTail, int kStart>
  __device__ __forceinline__ void part(QueryTile<kDim> (&tiles)[kQueries],
                                       const typename Group::Pairs (&pairs)[kQueries], const typename Group::Keys& keys,
                                       int key, int first, int count) const {
    constexpr int kCount = kKeys - kStart < kPart ? kKeys - kStart : kPart;
    static_assert(kKeys <= 2 * kPart && kPart % 2 == 0);
    const int column = threadIdx.x % 4 * 2;
    float s[kQueries][kCount][4];
#pragma unroll
    for (int at = 0; at < kCount; ++at) {
      const int n = kStart + at;
      if (kTail && n * 8 >= count) {
#pragma unroll
        for (int t = 0; t < kQueries; ++t) s[t][at][0] = s[t][at][1] = s[t][at][2] = s[t][at][3] = minus_infinity();
        continue;
      }
      uint32_t k[kDim / 32][4];
#pragma unroll
      for (int part = 0; part < kDim / 32; ++part)
        gpu::ldmatrix(k[part], k_shared + four_pieces(part * 4) + (first + n * 8) * Layout::kBytes);
#pragma unroll
      for (int t = 0; t < kQueries; ++t) {
        float added[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (kFolded) group.template folded<kMasked>(added, pairs[t], keys, n);
#pragma unroll
        for (int part = 0; part < kDim / 32; ++part) {
          gpu::mma_16x8x16<T>(s[t][at], tiles[t].q[2 * part], k[part][0], k[part][1], part == 0 ? added : s[t][at]);
          gpu::mma_16x8x16<T>(s[t][at], tiles[t].q[2 * part + 1], k[part][2], k[part][3], s[t][at]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = n * 8 + column + i % 2;
          if (kTail && j >= count)
            s[t][at][i] = minus_infinity();
          else if (!kFolded)
            s[t][at][i] = group.exact(s[t][at][i], row + 16 * t + i / 2 * 8, key + j);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kQueries; ++t) weigh(tiles[t], s[t]);
    add_values<kTail>(tiles, s, first + 8 * kStart, count - 8 * kStart);
  }

  // Turns scores into weights and adds them to the sums.
  template <int kCount>
  __device__ __forceinline__ void weigh(QueryTile<kDim>& tile, float (&s)[kCount][4]) const {
    const float factor = kFolded ? group.factor() : kLog2e;
    float largest[2] = {fmaxf(s[0][0], s[0][1]), fmaxf(s[0][2], s[0][3])};
#pragma unroll
    for (int n = 1; n < kCount; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        largest[half] = fmaxf(largest[half], fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    bool above = false;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      above |= kFolded ? fmaf(largest[half], factor, -tile.top[half]) > kSlack
                       : largest[half] > tile.top[half] + kSlack * kLn2;
    if (__any_sync(~0u, above)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) tile.template raise<kFolded>(half, largest[half], factor);
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float top = tile.top[i / 2];
        s[n][i] = gpu::exp2_approx(kFolded ? fmaf(s[n][i], factor, -top) : (s[n][i] - top) * factor);
        tile.sum[i / 2] += s[n][i];
      }
  }

  // out += weights V. Rows behind the last key hold zeros, up to a multiple of 16.
  template <bool kTail, int kCount>
  __device__ __forceinline__ void add_values(QueryTile<kDim> (&tiles)[kQueries], const float (&p)[kQueries][kCount][4],
                                             int first, int count) const {
#pragma unroll
    for (int n = 0; n < kCount; n += 2) {
      if (kTail && n * 8 >= count) break;
      uint32_t weights[kQueries][4];
#pragma unroll
      for (int t = 0; t < kQueries; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n + i / 2 < kCount)
            weights[t][i] = gpu::pack<T>(p[t][n + i / 2][i % 2 * 2], p[t][n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int part = 0; part < kDim / 16; ++part) {
        if (n + 1 < kCount) {
          uint32_t v[4];
          gpu::ldmatrix_transposed(v, v_shared + two_pieces(2 * part) + (first + n * 8) * Layout::kBytes);
#pragma unroll
          for (int t = 0; t < kQueries; ++t) {
            float (&out)[kDim / 8][4] = tiles[t].out;
            gpu::mma_16x8x16<T>(out[2 * part], weights[t], v[0], v[1], out[2 * part]);
            gpu::mma_16x8x16<T>(out[2 * part + 1], weights[t], v[2], v[3], out[2 * part + 1]);
          }
        } else if (part % 2 == 0) {  // the last 8 keys of an odd number of tiles
          uint32_t v[4];
          gpu::ldmatrix_transposed(v, v_shared + four_pieces(2 * part) + (first + n * 8) * Layout::kBytes);
#pragma unroll
          for (int t = 0; t < kQueries; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float (&out)[4] = tiles[t].out[2 * part + i];
              gpu::mma_16x8x8<T>(out, weights[t][0], weights[t][1], v[i], out);
            }
        }
      }
    }
  }

  // Keys [key, key + keys), which lie from row 0 of the shared memory on.
  template <bool kMasked>
  __device__ __forceinline__ void block(QueryTile<kDim> (&tiles)[kQueries], const Query (&query)[kQueries][2], int key,
                                        int keys) const {
    typename Group::Keys at = group.first_keys(key, threadIdx.x % 4 * 2);
    int first = 0;
#pragma unroll 1
    for (; first + kChunk <= keys; first += kChunk) {
      chunk<kMasked, false>(tiles, query, at, key + first, first, kChunk);
      group.advance(at, kChunk);
    }
    if constexpr (!(kFolded && Group::kWholeChunks))
      if (first < keys) chunk<true, true>(tiles, query, at, key + first, first, keys - first);
  }
};

// Divides by the sums and writes the rows that are queries, with their log-sum-exp.
// top_unit: of tile.top, in natural logarithms.
template <class T, int kDim, class Group>
__device__ __forceinline__ void write_rows(const Group& group, const QueryTile<kDim>& tile, int row, float top_unit) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = tile.sum[half];
    const int64_t token = group.output_row(row + 8 * half);
    if (token < 0) continue;
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // no key at all: zeros
    uint16_t* out = group.output(token);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int at = n * 8 + column;
      const uint32_t pair = gpu::pack<T>(tile.out[n][2 * half] * inverse, tile.out[n][2 * half + 1] * inverse);
      if (group.head_dim() % 2 == 0) {
        if (at < group.head_dim()) *reinterpret_cast<uint32_t*>(out + at) = pair;
      } else {
        if (at < group.head_dim()) out[at] = uint16_t(pair);
        if (at + 1 < group.head_dim()) out[at + 1] = uint16_t(pair >> 16);
      }
    }
    if (column == 0) *group.lse(token) = sum == 0.0f ? minus_infinity() : tile.top[half] * top_unit + logf(sum);
  }
}

// The keys and values of a group in the shared memory of its block: `block_keys` rows of keys, then of values.
template <int kDim, class Group>
struct SharedKeys {
  using Layout = Rows<kDim>;
  const typename Group::Arguments& arguments;
  Group group;

  __device__ explicit SharedKeys(const typename Group::Arguments& given) : arguments(given), group(given) {}
  __device__ __forceinline__ int keys() const { return group.keys(); }
  __device__ __forceinline__ bool resident() const { return arguments.plan.resident; }
  __device__ __forceinline__ unsigned char* k() const { return gpu::shared_memory<unsigned char>(); }
  __device__ __forceinline__ unsigned char* v() const { return k() + arguments.plan.block_keys * Layout::kBytes; }

  // Copies keys and values [key, key + count) to row 0; rows behind the last key, up to a multiple of 16, are 0.
  __device__ __forceinline__ void copy(int key, int count) const {
    for (int i = threadIdx.x; i < (count + 15) / 16 * 16 * Layout::kPieces; i += blockDim.x) {
      const int row = i / Layout::kPieces, piece = i % Layout::kPieces;
      const uint32_t place = Layout::place(row, piece);
      copy_piece(k(), place, group.key(key + row), piece, group.head_dim(), group.unit(), group.readable());
      copy_piece(v(), place, group.value(key + row), piece, group.head_dim(), group.unit(), group.readable());
    }
    gpu::cp_async_commit();
  }

  // Shows all keys to visit(first key, number of keys), block by block. All threads of the block come here.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for (int key = 0; key < keys(); key += arguments.plan.block_keys) {
      const int count = min(keys() - key, arguments.plan.block_keys);
      if (!resident()) {
        __syncthreads();
        copy(key, count);
        gpu::cp_async_wait<0>();
        __syncthreads();
      }
      visit(key, count);
    }
  }

  template <class Tile, class Query>
  __device__ __forceinline__ void load(Tile& tile, Query (&query)[2], int row, bool folded) const {
    load_queries<kDim>(tile.q, group.query(row), group.query(row + 8), group.head_dim(), group.query_unit());
    tile.reset(folded);
    query[0] = group.describe(row), query[1] = group.describe(row + 8);
  }

  template <class Walk>
  __device__ __forceinline__ Walk walk(int row) const {
    return {group, gpu::shared_address(k()), gpu::shared_address(v()), row};
  }
};

// The exact way for `tiles` tiles of 16 queries of each warp, where it is not done. It is rare, and a function of its
// own, so that it takes no registers from the other way.
template <class T, int kDim, class Group>
__device__ __attribute__((noinline)) void attend_exactly(const typename Group::Arguments& arguments, int first_row,
                                                         int tiles, bool done) {
  const SharedKeys<kDim, Group> shared(arguments);
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int t = 0; t < tiles; ++t) {
    const int row = first_row + 16 * t + lane / 4;
    const bool active = !done && first_row + 16 * t < shared.keys();
    const auto walk = shared.template walk<Walk<T, kDim, Group, false, 1, 2>>(row);
    QueryTile<kDim> tile[1];
    typename Group::Query query[1][2];
    if (active) shared.load(tile[0], query[0], row, false);
    shared.for_each([&](int key, int count) {
      if (active) walk.template block<true>(tile, query, key, count);
    });
    if (active) {
      tile[0].add_up();
      write_rows<T, kDim>(shared.group, tile[0], row, 1.0f);
    }
  }
}

// A block of threads of one (group, head). Its warps take kQueries tiles of queries each, all at the same time.
template <class T, int kDim, class Group, int kQueries, int kKeys>
__device__ __forceinline__ void attention_forward(const typename Group::Arguments& arguments) {
  SharedKeys<kDim, Group> shared(arguments);
  shared.group.find_rows();
  __syncthreads();
  if (shared.resident()) shared.copy(0, shared.keys());
  const bool folds = __syncthreads_and(shared.group.load_bias());
  gpu::cp_async_wait<0>();
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll 1
  for (int pass = 0; pass < shared.keys(); pass += 16 * kQueries * warps) {
    const int first_row = pass + 16 * kQueries * warp, row = first_row + lane / 4;
    bool done = first_row >= shared.keys();
    if (folds) {
      const auto walk = shared.template walk<Walk<T, kDim, Group, true, kQueries, kKeys>>(row);
      QueryTile<kDim> tiles[kQueries];
      typename Group::Query query[kQueries][2];
      if (!done)
#pragma unroll
        for (int t = 0; t < kQueries; ++t) shared.load(tiles[t], query[t], row + 16 * t, true);
      const bool active = !done;
      shared.for_each([&](int key, int count) {
        if (!active) return;
        if (shared.group.masks())
          walk.template block<true>(tiles, query, key, count);
        else
          walk.template block<false>(tiles, query, key, count);
      });
      if (active) {
        done = true;
#pragma unroll
        for (int t = 0; t < kQueries; ++t) done &= tiles[t].add_up();
      }
      if (active && done)
#pragma unroll
        for (int t = 0; t < kQueries; ++t) write_rows<T, kDim>(shared.group, tiles[t], row + 16 * t, kLn2);
    }
    if (shared.resident() ? done : __syncthreads_and(done)) continue;
    attend_exactly<T, kDim, Group>(arguments, first_row, kQueries, done);
  }
}

}  // namespace vidattn::cuda
