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
constexpr int kTogether = 2;               // tiles of queries that a warp does at a time
constexpr float kNothing = 40.0f;          // a weight of 2^-40 of the largest shows in no sum of 1200
constexpr float kHuge = 1e30f;             // of the square of a length
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
  float minus_top[2];  // what weights are relative to, negated. Folded: in powers of two; exact: a score

  __device__ __forceinline__ void reset(bool folded) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
    sum[0] = sum[1] = 0.0f;
    minus_top[0] = minus_top[1] = folded ? -kFoldedStart : -kLowest;  // finite: a score of -inf has a weight of 0
  }

  // Raises top to the largest score of some keys.
  template <bool kFolded>
  __device__ __forceinline__ void raise(int half, float largest, float factor) {
    const float found = maximum_of_quad(largest), before = minus_top[half];
    minus_top[half] = fminf(before, kFolded ? found * -factor : -found);
    const float fall = minus_top[half] - before, shrink = gpu::exp2_approx(kFolded ? fall : fall * kLog2e);
    sum[half] *= shrink;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) out[n][2 * half] *= shrink, out[n][2 * half + 1] *= shrink;
  }
  template <bool kFolded>
  static __device__ __forceinline__ bool is_far_above(float score, float minus_top, float factor) {
    return kFolded ? fmaf(score, factor, minus_top) > kSlack : score > kSlack * kLn2 - minus_top;
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
      right &= sum[half] > 0.0f && sum[half] <= -kLowest && fabsf(minus_top[half]) <= kLargestFolded;
    }
    return __all_sync(~0u, right);
  }
};

// How a warp walks over keys: kQueries tiles of 16 queries, and chunks of kKeys tiles of 8 keys, whose scores it holds
// at a time.
template <class T, int kDim, class Group, bool kFolded, int kQueries, int kKeys>
struct Walk {
  using Layout = Rows<kDim>;
  using Tile = QueryTile<kDim>;
  using Query = typename Group::Query;
  static constexpr int kChunk = 8 * kKeys;

  const Group& group;
  const int row, column;  // the first of this lane, and of eight keys
  // This lane's part of an address of ldmatrix: for four pieces of 8 rows of keys, and for two pieces of 16 rows of
  // values. Rows a multiple of 8 apart have their pieces in the same places, so the rest is a multiple of 8 rows.
  uint32_t k_part[kDim / 32], v_part[kDim / 16];
  const uint32_t distance;  // from keys to values

  __device__ __forceinline__ Walk(const Group& given, uint32_t k, uint32_t v, int first_row, int thread)
      : group(given), row(first_row), column(thread % 4 * 2), distance(v - k) {
    const int lane = thread % 32;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) k_part[i] = gpu::keep(k + Layout::place(lane % 8, 4 * i + lane / 8));
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) v_part[i] = gpu::keep(v + Layout::place(lane % 16, 2 * i + lane / 16));
  }

  // Keys [key, key + count) of the group, which lie from row `first` of the shared memory on; kTail: count < kChunk.
  template <bool kMasked, bool kTail>
  __device__ __forceinline__ void chunk(Tile* tiles, const Query (*query)[2], const typename Group::Keys& keys, int key,
                                        int first, int count) const {
    const int bytes = first * Layout::kBytes;
    typename Group::Pairs pairs[kQueries];
    if constexpr (kFolded)
#pragma unroll
      for (int t = 0; t < kQueries; ++t) pairs[t] = group.template pairs<kMasked>(query[t], row + 16 * t, keys);
    uint32_t k_lane[kDim / 32];
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) k_lane[i] = gpu::keep(k_part[i] + bytes);

    float s[kQueries][kKeys][4];
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      if constexpr (kTail)
        if (n * 8 >= count) {
#pragma unroll
          for (int t = 0; t < kQueries; ++t) s[t][n][0] = s[t][n][1] = s[t][n][2] = s[t][n][3] = minus_infinity();
          continue;
        }
      uint32_t k[kDim / 32][4];
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) gpu::ldmatrix(k[i], k_lane[i] + n * 8 * Layout::kBytes);
#pragma unroll
      for (int t = 0; t < kQueries; ++t) {
        float added[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (kFolded) group.template folded<kMasked>(added, pairs[t], keys, n);
#pragma unroll
        for (int i = 0; i < kDim / 32; ++i) {
          gpu::mma_16x8x16<T>(s[t][n], tiles[t].q[2 * i], k[i][0], k[i][1], i == 0 ? added : s[t][n]);
          gpu::mma_16x8x16<T>(s[t][n], tiles[t].q[2 * i + 1], k[i][2], k[i][3], s[t][n]);
        }
        if (!kFolded || (kTail && n * 8 + 8 > count))
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = n * 8 + column + i % 2;
            if (kTail && j >= count)
              s[t][n][i] = minus_infinity();
            else if (!kFolded)
              s[t][n][i] = group.exact(s[t][n][i], row + 16 * t + i / 2 * 8, key + j);
          }
      }
    }
    weigh(tiles, s);
    add_values<kTail>(tiles, s, bytes, count);
  }

  // Turns scores into weights and adds them to the sums.
  __device__ __forceinline__ void weigh(Tile* tiles, float (&s)[kQueries][kKeys][4]) const {
    const float factor = kFolded ? group.factor() : kLog2e;
    float largest[kQueries][2];
    bool above = false;
#pragma unroll
    for (int t = 0; t < kQueries; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& most = largest[t][half] = fmaxf(s[t][0][2 * half], s[t][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kKeys; ++n) most = fmaxf(most, fmaxf(s[t][n][2 * half], s[t][n][2 * half + 1]));
        above |= Tile::template is_far_above<kFolded>(most, tiles[t].minus_top[half], factor);
      }
    if (__any_sync(~0u, above)) {
#pragma unroll
      for (int t = 0; t < kQueries; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) tiles[t].template raise<kFolded>(half, largest[t][half], factor);
    }
#pragma unroll
    for (int t = 0; t < kQueries; ++t)
#pragma unroll
      for (int n = 0; n < kKeys; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float minus_top = tiles[t].minus_top[i / 2];
          s[t][n][i] =
              gpu::exp2_approx(kFolded ? fmaf(s[t][n][i], factor, minus_top) : (s[t][n][i] + minus_top) * factor);
          tiles[t].sum[i / 2] += s[t][n][i];
        }
  }

  // out += weights V, for the rows of V that start `bytes` behind the first. Those behind the last key hold zeros, up
  // to a multiple of 16 rows where kKeys is even.
  template <bool kTail>
  __device__ __forceinline__ void add_values(Tile* tiles, const float (&p)[kQueries][kKeys][4], int bytes,
                                             int count) const {
    uint32_t v_lane[kDim / 16];
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) v_lane[i] = gpu::keep(v_part[i] + bytes);
#pragma unroll
    for (int n = 0; n < kKeys; n += 2) {
      if (kTail && n * 8 >= count) break;
      uint32_t weights[kQueries][4];
#pragma unroll
      for (int t = 0; t < kQueries; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n + i / 2 < kKeys)
            weights[t][i] = gpu::pack<T>(p[t][n + i / 2][i % 2 * 2], p[t][n + i / 2][i % 2 * 2 + 1]);
      if (n + 1 < kKeys) {
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
          uint32_t v[4];
          gpu::ldmatrix_transposed(v, v_lane[i] + n * 8 * Layout::kBytes);
#pragma unroll
          for (int t = 0; t < kQueries; ++t) {
            float (&out)[kDim / 8][4] = tiles[t].out;
            gpu::mma_16x8x16<T>(out[2 * i], weights[t], v[0], v[1], out[2 * i]);
            gpu::mma_16x8x16<T>(out[2 * i + 1], weights[t], v[2], v[3], out[2 * i + 1]);
          }
        }
      } else {  // the last 8 keys of an odd number of tiles
#pragma unroll
        for (int i = 0; i < kDim / 32; ++i) {
          uint32_t v[4];
          gpu::ldmatrix_transposed(v, k_part[i] + distance + bytes + n * 8 * Layout::kBytes);
#pragma unroll
          for (int t = 0; t < kQueries; ++t)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              float (&out)[4] = tiles[t].out[4 * i + j];
              gpu::mma_16x8x8<T>(out, weights[t][0], weights[t][1], v[j], out);
            }
        }
      }
    }
  }

  // Keys [key, key + keys), which lie from row 0 of the shared memory on. Groups of whole chunks, of which there are
  // less than 32, may skip those without a bit in `seen.chunks`.
  template <bool kMasked>
  __device__ __forceinline__ void block(Tile* tiles, const Query (*query)[2], int key, int keys,
                                        typename Group::Seen seen) const {
    if constexpr (kFolded && Group::kWholeChunks) {
      uint32_t chunks = seen.chunks;
#pragma unroll 1
      while (chunks != 0) {  // runs of neighbours
        const int begin = __ffs(int(chunks)) - 1;
        const int end = min(__ffs(int(~(chunks >> begin))) - 1 + begin, group.end_of_run(begin));
        chunks = chunks >> end << end;
        typename Group::Keys at = group.keys_of_chunk(begin, column, seen);
#pragma unroll 1
        for (int first = kChunk * begin; first < kChunk * end; first += kChunk) {
          chunk<kMasked, false>(tiles, query, at, first, first, kChunk);
          group.next_chunk(at, seen);
        }
      }
    } else {
      int first = 0;
#pragma unroll 1
      for (; first + kChunk <= keys; first += kChunk)
        chunk<kMasked, false>(tiles, query, group.first_keys(key + first, column), key + first, first, kChunk);
      if (first < keys)
        chunk<kMasked, true>(tiles, query, group.first_keys(key + first, column), key + first, first, keys - first);
    }
  }
};

// Divides tiles by their sums and writes the rows that are queries, with their log-sum-exp.
// top_unit: of tile.minus_top, in natural logarithms.
template <class T, int kDim, class Group, int kTiles>
__device__ __forceinline__ void write_rows(const Group& group, const QueryTile<kDim> (&tiles)[kTiles], int count,
                                           int row, float top_unit, int thread) {
  const int column = thread % 4 * 2;
  const bool plain = group.is_plain(kOut);
  const auto rows = group.plain_rows(kOut);
  const auto log_sums = group.log_sums();
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const QueryTile<kDim>& tile = tiles[t];
      const int n = row + 16 * t + 8 * half, token = t < count ? group.token(n) : kNoToken;
      if (token < 0) continue;
      const float sum = tile.sum[half], log_sum = gpu::log2_approx(sum);
      const float inverse = sum == 0.0f ? 0.0f : gpu::exp2_approx(-log_sum);  // no key at all: zeros
      if (column == 0) *log_sums.at(token) = log_sum * kLn2 - tile.minus_top[half] * top_unit;
      if constexpr (Group::kSharesTokens)
        if (group.is_shared(n)) {
#pragma unroll
          for (int i = 0; i < kDim / 8; ++i)
            group.write_shared(kOut, i * 8 + column, tile.out[i][2 * half] * inverse,
                               tile.out[i][2 * half + 1] * inverse);
          continue;
        }
      uint32_t pairs[kDim / 8];
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i)
        pairs[i] = gpu::pack<T>(tile.out[i][2 * half] * inverse, tile.out[i][2 * half + 1] * inverse);
      if (plain) {
        char* out = const_cast<char*>(rows.at(token)) + 2 * column;
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i)
          if (i * 8 < group.head_dim()) *reinterpret_cast<uint32_t*>(out + 16 * i) = pairs[i];
      } else {
        char* out = const_cast<char*>(group.row(kOut, n));
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i) write_pair(out, i * 8 + column, group.head_dim(), 2, pairs[i]);
      }
    }
}

// The keys and values of a group in the shared memory of its block: `block_keys` rows of keys, then of values.
// kResident: these are all of them; else they come block by block.
template <int kElements, class G, bool kResident>
struct SharedKeys {
  using Group = G;
  using Layout = Rows<kElements>;
  static constexpr int kDim = kElements;
  static constexpr bool kAll = kResident;
  const typename Group::Arguments& arguments;
  Group group;

  __device__ explicit SharedKeys(const typename Group::Arguments& given) : arguments(given), group(given) {}
  __device__ SharedKeys(const typename Group::Arguments& given, typename Group::Kept kept)
      : arguments(given), group(given, kept) {}
  __device__ __forceinline__ int keys() const { return group.keys(); }
  // Where a block of keys lies, and its values: there may be two blocks.
  __device__ __forceinline__ unsigned char* k(int stage) const {
    return gpu::shared_memory<unsigned char>() + 2 * stage * arguments.plan.block_keys * Layout::kBytes;
  }
  __device__ __forceinline__ unsigned char* v(int stage) const {
    return k(stage) + arguments.plan.block_keys * Layout::kBytes;
  }

  // Starts to copy a block of keys and values, from `key` on; rows behind the last key, up to a multiple of 16, are 0.
  // Whole chunks have no rows behind them.
  __device__ __forceinline__ void copy(int key, int stage) const {
    const int count = min(keys() - key, arguments.plan.block_keys);
    const int rows = Group::kWholeChunks ? count : (count + 15) / 16 * 16;
    copy_rows<kDim>(group, kK, kV, key, count, rows, k(stage), v(stage), int(threadIdx.x), int(blockDim.x));
    gpu::cp_async_commit();
  }

  // Shows all keys to visit(first key, number of keys, stage), block by block. All threads of the block come here.
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    if constexpr (kResident) {
      visit(0, keys(), 0);
    } else {
      const int step = arguments.plan.block_keys;
#pragma unroll 1
      for (int key = -step, stage = 1; key < keys(); key += step, stage ^= 1) {
        gpu::cp_async_wait<0>();
        __syncthreads();  // this block is there, and the one before it is done with
        if (key + step < keys()) copy(key + step, stage ^ 1);
        if (key >= 0) visit(key, min(keys() - key, step), stage);
      }
    }
  }

  __device__ __forceinline__ void load(QueryTile<kDim>& tile, int row, bool folded, int thread) const {
    if (group.is_plain(kQ)) {
      const auto rows = group.plain_rows(kQ);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = group.token(row + 8 * half);
        const char* words = rows.at(max(token, 0)) + thread % 4 * 4;
#pragma unroll
        for (int piece = 0; piece < kDim / 8; ++piece)
          tile.q[piece / 2][piece % 2 * 2 + half] =
              token >= 0 && piece * 8 < group.head_dim() ? *reinterpret_cast<const uint32_t*>(words + 16 * piece) : 0;
      }
    } else {
      load_queries<kDim>(tile.q, group.query(row), group.query(row + 8), group.head_dim(), 2, thread);
    }
    tile.reset(folded);
  }

  // Leaves this block's largest lengths of keys and bias for may_hide(). A value that is not moderate makes them too
  // large for any proof. To be called with keys and values in shared memory, and to be followed by a barrier.
  template <class T>
  __device__ void measure(float largest_bias) const {
    float largest = 0.0f;
    for (int row = threadIdx.x; row < 2 * arguments.plan.block_keys; row += blockDim.x) {
      const float length = square_length<T, kDim>(k(0) + row * Layout::kBytes);
      if (!(length <= kHuge))  // so that NaN is found
        largest = kHuge;
      else if (row < arguments.plan.block_keys)
        largest = fmaxf(largest, length);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
      largest_bias = fmaxf(largest_bias, __shfl_xor_sync(~0u, largest_bias, lanes));
    }
    float2* const measures = group.measures();
    if (threadIdx.x % 32 == 0) measures[threadIdx.x / 32] = make_float2(largest, largest_bias);
    __syncthreads();
    if (threadIdx.x == 0)
#pragma unroll 1
      for (int warp = 1; warp < int(blockDim.x / 32); ++warp) {
        const float2 most = measures[0], other = measures[warp];
        measures[0] = make_float2(fmaxf(most.x, other.x), fmaxf(most.y, other.y));
      }
  }

  // Whether keys of other regions certainly have no weight in these queries. A score is at most the product of the
  // lengths plus the largest bias, and at least minus that; each query sees one key of its own region, itself.
  template <class T, int kQueries>
  __device__ __forceinline__ bool may_hide(const QueryTile<kDim> (&tiles)[kQueries]) const {
    const float2 most = *group.measures();
    const float room = group.hiding_room() - most.y;
    bool hides = room > 0.0f && most.x < kHuge;
#pragma unroll
    for (int t = 0; t < kQueries; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float length = 0.0f;
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i)
          length += square_sum<T>(tiles[t].q[i][half]) + square_sum<T>(tiles[t].q[i][half + 2]);
        length += __shfl_xor_sync(~0u, length, 1);
        length += __shfl_xor_sync(~0u, length, 2);
        hides &= length <= kHuge && 1.05f * length * most.x <= room * room;
      }
    return __all_sync(~0u, hides);
  }

  template <class Walk>
  __device__ __forceinline__ Walk walk(int row, int stage, int thread) const {
    return Walk(group, gpu::shared_address(k(stage)), gpu::shared_address(v(stage)), row, thread);
  }
};

// The tiles of 16 queries that a warp does at a time: from `tile` on, `count` of them, which may be none. A pair is
// always of the same two, so the bits do not depend on who does it.
struct Share {
  int tile, count, thread;

  // Each warp has a range of all pairs, the same number give or take one. The longer ranges go to another warp in each
  // block, as the four schedulers of a multiprocessor have warps of their own; the blocks that share one are about 128
  // apart.
  template <class Group>
  static __device__ __forceinline__ void find(const Group& group, const typename Group::Arguments& arguments) {
    const int block = int(blockIdx.x), warp = int(threadIdx.x / 32), warps = int(blockDim.x / 32);
    const int pairs = (arguments.plan.tiles + kTogether - 1) / kTogether;
    const int turn = arguments.warps.remainder(warp + ((block ^ block >> 7) & 0xffff));
    const int share = arguments.splits.remainder(arguments.heads.quotient(block)) * warps + turn;
    if (threadIdx.x % 32 == 0)
      group.shares()[warp] =
          make_int2(arguments.shares.quotient(pairs * share), arguments.shares.quotient(pairs * (share + 1)));
  }
  // From there. This is done wherever it is needed: it would take registers in between.
  template <class Group>
  __device__ __forceinline__ Share(const Group& group, int tiles, int pass)
      : thread(int(gpu::keep(threadIdx.x) & 1023)) {
    const int2 pairs = group.shares()[thread / 32];
    tile = kTogether * (pairs.x + pass);
    count = pairs.x + pass < pairs.y ? min(tiles - tile, kTogether) : 0;
  }
  __device__ __forceinline__ int row() const { return 16 * tile + thread % 32 / 4; }  // the first of this lane
};

// The folded way for a warp's share. Returns whether that is done, with right numbers.
template <class T, class Shared, int kKeys>
__device__ __forceinline__ bool attend_folded(const typename Shared::Group::Arguments& arguments, int pass) {
  using Group = typename Shared::Group;
  constexpr int kDim = Shared::kDim;
  QueryTile<kDim> tiles[kTogether];
  {
    const Shared shared(arguments, typename Group::Kept{});
    const Share share(shared.group, arguments.plan.tiles, pass);
    const int row = share.row();
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
      shared.load(tiles[t], t < share.count ? row + 16 * t : shared.keys(), true, share.thread);
    bool masks = shared.group.masks();
    typename Group::Seen seen = shared.group.all_seen();
    if constexpr (Group::kWholeChunks)
      if (share.count > 0 && shared.group.could_hide() && shared.template may_hide<T>(tiles))
        masks = !shared.group.hide(seen, 16 * share.tile, 16 * share.count);
    typename Group::Query query[kTogether][2];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) shared.group.describe(query[t], row + 16 * t, share.thread, seen);
    shared.for_each([&](int key, int keys, int stage) {
      const auto attend = [&](const auto& walk) {
        if (masks)
          walk.template block<true>(tiles, query, key, keys, seen);
        else
          walk.template block<false>(tiles, query, key, keys, seen);
      };
      if (share.count == kTogether)
        attend(shared.template walk<Walk<T, kDim, Group, true, kTogether, kKeys>>(row, stage, share.thread));
      else if (share.count == 1)
        attend(shared.template walk<Walk<T, kDim, Group, true, 1, kKeys>>(row, stage, share.thread));
    });
  }
  const Shared shared(arguments, typename Group::Kept{});
  const Share share(shared.group, arguments.plan.tiles, pass);
  bool right = true;
#pragma unroll
  for (int t = 0; t < kTogether; ++t)
    if (t < share.count) right &= tiles[t].add_up();
  if (right) write_rows<T>(shared.group, tiles, share.count, share.row(), kLn2, share.thread);
  return right;
}

// The exact way for a warp's share, where it is not done.
template <class T, class Shared>
__device__ __forceinline__ void attend_exactly(const typename Shared::Group::Arguments& arguments, int pass,
                                               bool done) {
  using Group = typename Shared::Group;
  constexpr int kDim = Shared::kDim;
  const Shared shared(arguments, typename Group::Kept{});
  const Share share(shared.group, arguments.plan.tiles, pass);
#pragma unroll 1
  for (int t = 0; t < kTogether; ++t) {
    const int row = share.row() + 16 * t;
    const bool active = !done && t < share.count;
    QueryTile<kDim> tiles[1], &tile = tiles[0];
    const typename Group::Query query[1][2] = {};  // what is folded in
    shared.load(tile, active ? row : shared.keys(), false, share.thread);
    shared.for_each([&](int key, int keys, int stage) {
      const auto walk =
          shared.template walk<Walk<T, kDim, Group, false, 1, Group::kWholeChunks ? 1 : 2>>(row, stage, share.thread);
      if (active) walk.template block<true>(tiles, query, key, keys, shared.group.all_seen());
    });
    if (active) {
      tile.add_up();
      write_rows<T>(shared.group, tiles, 1, row, 1.0f, share.thread);
    }
  }
}

// A block of threads of one (group, head), or of a share of its queries. A warp does two tiles of queries at a time:
// keys that are loaded serve both.
template <class T, class Shared, int kKeys>
__device__ __forceinline__ void attention_forward(const typename Shared::Group::Arguments& arguments) {
  bool folds;
  {
    Shared shared(arguments);
    shared.group.keep();
    shared.group.find_rows();
    Share::find(shared.group, arguments);
    __syncthreads();
    if (Shared::kAll) shared.copy(0, 0);
    float largest_bias = 0.0f;
    folds = __syncthreads_and(shared.group.load_bias(largest_bias));
    gpu::cp_async_wait<0>();
    __syncthreads();
    if constexpr (Shared::Group::kWholeChunks)
      if (shared.group.could_hide()) {
        shared.template measure<T>(largest_bias);
        __syncthreads();
      }
  }
  const int together = arguments.plan.splits * int(blockDim.x / 32) * kTogether;
#pragma unroll 1
  for (int pass = 0; pass * together < arguments.plan.tiles; ++pass) {
    const bool done = folds && attend_folded<T, Shared, kKeys>(arguments, pass);
    if (Shared::kAll ? !done : !__syncthreads_and(done)) attend_exactly<T, Shared>(arguments, pass, done);
  }
}

}  // namespace vidattn::cuda
