// Attention within sequences of at most 32 rows, by one warp: all that a tile of 16 or 32 rows needs is in registers.
//
// A tile holds as many whole sequences as fit, of one head; scores between them are hidden. A lane has 8 neighbouring
// elements of each eighth row, 16 bytes in memory. As the order of a sum over elements is free, the tensor cores take
// its words as they lie; so is the order of columns, and what a lane gets of a result are 8 neighbouring elements
// again.
#pragma once
#include <primitives.cuh>

#include <type_traits>

#include "divided_args.h"
#include "divisor.cuh"
#include "rows.cuh"

namespace vidattn::cuda {

struct ShortArguments {
  DividedArgs call;
  Divisor length, groups, heads;   // of a sequence; of a clip; that attend along this axis
  int sequences, per_tile, tiles;  // in all clips; of a tile; of all heads
  int unit;                        // the number of bytes that all rows and head_dim are a multiple of: 16, 4 or 2
  float scale;
};

template <class T, int kDim, int kRows>
class ShortTile {
  static constexpr int kEights = kRows / 8, kParts = kDim / 32;
  static constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

  // Eight elements of each eighth row, of each 32 elements.
  using Matrix = uint32_t[kEights][kParts][4];
  // Of a pair of eights of rows with an eight of keys, as the tensor cores give them.
  using Scores = float[kEights / 2][kEights][4];
  // The same, rounded, by eights of rows and of keys.
  using Weights = uint32_t[kEights][kEights];
  // Sums of 32 elements of rows: the two elements 2 i of this lane's eight, of two rows.
  using Sums = float[kEights / 2][4][4];

 public:
  static constexpr int kAll = -1;

  // Of a tile all sequences, or one.
  __device__ __forceinline__ ShortTile(const ShortArguments& arguments, int tile, int only) : a(arguments) {
    head_ = int(a.call.first_head) + a.heads.split(tile);
    const int length = int(a.call.patches);
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int n = 8 * e + lane / 4, number = a.length.quotient(n), place = n - number * length;
      const int sequence = tile * a.per_tile + number, clip = a.groups.quotient(sequence);
      const int group = sequence - clip * int(a.call.groups);
      const bool real = number < a.per_tile && sequence < a.sequences && (only == kAll || only == number);
      clip_[e] = clip;
      token_[e] = real ? group * int(a.call.group_step) + place * int(a.call.position_step) : kNoToken;
      visible_[e] = (~0u >> (32 - length)) << (n - place) >> (lane % 4 * 2);
    }
  }

  // Returns whether something may not be finite.
  __device__ __forceinline__ bool forward() const {
    Matrix q, k, v;
    load([&](auto unit) { load(q, kQ, unit), load(k, kK, unit), load(v, kV, unit); });
    Scores scores;
    multiply(scores, q, k);
    float maximum[kEights], sum[kEights];
    soften(scores, maximum, sum);
    if (a.call.lse && lane % 4 == 0) {
#pragma unroll
      for (int e = 0; e < kEights; ++e)
        if (token_[e] >= 0) *lse(e) = fmaf(gpu::log2_approx(sum[e]), kLn2, maximum[e]);
    }
    Weights weights;
    round(weights, scores);
    float inverse[kEights];
#pragma unroll
    for (int e = 0; e < kEights; ++e) inverse[e] = inverse_of(sum[e]);
    return !(write(kOut, weights, v, inverse) * 0.0f == 0.0f);
  }

  // The same of the gradients. What is not finite in a row makes a product of the row with itself so.
  __device__ __forceinline__ bool backward() const {
    Matrix q, k, v, dout;
    load([&](auto unit) { load(q, kQ, unit), load(k, kK, unit), load(v, kV, unit), load(dout, kDout, unit); });
    Scores p, ds;
    multiply(p, q, k);
    multiply(ds, dout, v);
    float maximum[kEights], sum[kEights], factor[kEights];
    const bool finite = (total(p) + total(ds)) * 0.0f == 0.0f;
    soften(p, maximum, sum);
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const float inverse = inverse_of(sum[e]);
      float delta = 0.0f;
#pragma unroll
      for (int j = 0; j < kEights; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& weight = p[e / 2][j][e % 2 * 2 + i];
          weight *= inverse;
          delta = fmaf(weight, ds[e / 2][j][e % 2 * 2 + i], delta);
        }
      delta = of_quad(delta, [](float x, float y) { return x + y; });
#pragma unroll
      for (int j = 0; j < kEights; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& gradient = ds[e / 2][j][e % 2 * 2 + i];
          gradient = p[e / 2][j][e % 2 * 2 + i] * (gradient - delta);
        }
      factor[e] = 1.0f;
    }
    Weights weights;
    round(weights, p);
    transpose(weights);
    write(kDv, weights, dout, factor);
    const float size = bring_into_range(ds);
#pragma unroll
    for (int e = 0; e < kEights; ++e) factor[e] = a.scale * size;
    round(weights, ds);
    write(kDq, weights, k, factor);
    transpose(weights);
    write(kDk, weights, q, factor);
    return !finite;
  }

 private:
  __device__ __forceinline__ char* row(Slot slot, int e) const {
    const RowTensor& x = a.call.tensor[slot];
    return x.data + uint64_t(uint32_t(clip_[e])) * x.stride[0] + uint64_t(uint32_t(token_[e])) * x.stride[1] +
           uint64_t(uint32_t(head_)) * x.stride[2];
  }
  __device__ __forceinline__ float* lse(int e) const {
    const int64_t row = clip_[e] * (a.call.frames * a.call.sites) + token_[e];
    return static_cast<float*>(a.call.lse) + row * a.call.heads + head_;
  }
  __device__ __forceinline__ int first_element(int part) const { return 32 * part + lane % 4 * 8; }

  // Loads by the units that rows have.
  template <class Load>
  __device__ __forceinline__ void load(Load all) const {
    if (a.unit == 16)
      all(std::integral_constant<int, 16>());
    else if (a.unit == 4)
      all(std::integral_constant<int, 4>());
    else
      all(std::integral_constant<int, 2>());
  }
  template <class Unit>
  __device__ __forceinline__ void load(Matrix& x, Slot slot, Unit) const {
    const int dim = int(a.call.head_dim);
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const char* from = row(slot, e);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int first = first_element(part);
        uint32_t (&words)[4] = x[e][part];
        if constexpr (Unit::value == 2) {
          load_piece(words, token_[e] >= 0 ? from : nullptr, first, dim);
        } else if constexpr (Unit::value == 4) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            words[i] = 0;
            if (token_[e] >= 0 && first + 2 * i < dim)
              words[i] = *reinterpret_cast<const uint32_t*>(from + 2 * first + 4 * i);
          }
        } else {
          uint4 piece = {};
          if (token_[e] >= 0 && first < dim) piece = *reinterpret_cast<const uint4*>(from + 2 * first);
          words[0] = piece.x, words[1] = piece.y, words[2] = piece.z, words[3] = piece.w;
        }
      }
    }
  }

  // Products of all rows of two tensors.
  static __device__ __forceinline__ void multiply(Scores& scores, const Matrix& x, const Matrix& y) {
#pragma unroll
    for (int pair = 0; pair < kEights / 2; ++pair)
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
        float (&c)[4] = scores[pair][j];
        c[0] = c[1] = c[2] = c[3] = 0.0f;
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            const auto &low = x[2 * pair][part], &high = x[2 * pair + 1][part];
            const uint32_t rows[4] = {low[i], high[i], low[i + 1], high[i + 1]};
            gpu::mma_16x8x16<T>(c, rows, y[j][part][i], y[j][part][i + 1], c);
          }
      }
  }

  static __device__ __forceinline__ float total(const Scores& scores) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kEights * kEights * 2; ++i) sum += (&scores[0][0][0])[i];
    return sum;
  }

  // Makes exp(score - maximum of the row) of products, 0 between sequences, and sums of rows. The maximum of a row of
  // -inf alone reads 0.
  __device__ __forceinline__ void soften(Scores& scores, float (&maximum)[kEights], float (&sum)[kEights]) const {
    const float lowest = -__int_as_float(0x7f800000);
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      float most = lowest, total = 0.0f;
#pragma unroll
      for (int j = 0; j < kEights; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[e / 2][j][e % 2 * 2 + i];
          score = visible_[e] >> (8 * j + i) & 1 ? score * a.scale : lowest;
          most = fmaxf(most, score);
        }
      most = of_quad(most, [](float x, float y) { return fmaxf(x, y); });
      maximum[e] = most = most == lowest ? 0.0f : most;
#pragma unroll
      for (int j = 0; j < kEights; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[e / 2][j][e % 2 * 2 + i];
          score = gpu::exp2_approx((score - most) * kLog2e);
          total += score;
        }
      sum[e] = of_quad(total, [](float x, float y) { return x + y; });
    }
  }
  // A row without any weight has the sum 0, and no weight then either.
  static __device__ __forceinline__ float inverse_of(float sum) { return sum == 0.0f ? 0.0f : __fdividef(1.0f, sum); }

  template <class Combine>
  static __device__ __forceinline__ float of_quad(float x, Combine combine) {
    x = combine(x, __shfl_xor_sync(~0u, x, 1));
    return combine(x, __shfl_xor_sync(~0u, x, 2));
  }

  // float16 ends where gradients of scores need not: multiplies them by the power of 2 that brings the largest near its
  // end, which leaves 2^28 for smaller ones of full precision. Returns what undoes it.
  static __device__ __forceinline__ float bring_into_range(Scores& scores) {
    if constexpr (!std::is_same_v<T, __half>) return 1.0f;
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kEights * kEights * 2; ++i) most = fmaxf(most, fabsf((&scores[0][0][0])[i]));
#pragma unroll
    for (int bits = 1; bits < 32; bits *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, bits));
    const int exponent = max(__float_as_int(most) >> 23, 15);  // plus 127; what undoes it has one too
    if (exponent == 255) return 1.0f;
    const float up = __int_as_float((127 + 14 + 127 - exponent) << 23);  // to 2^14 or more, below 2^15
#pragma unroll
    for (int i = 0; i < kEights * kEights * 2; ++i) (&scores[0][0][0])[i] *= up;
    return __int_as_float((exponent - 14) << 23);
  }

  static __device__ __forceinline__ void round(Weights& weights, const Scores& scores) {
#pragma unroll
    for (int e = 0; e < kEights; ++e)
#pragma unroll
      for (int j = 0; j < kEights; ++j)
        weights[e][j] = gpu::pack<T>(scores[e / 2][j][e % 2 * 2], scores[e / 2][j][e % 2 * 2 + 1]);
  }
  static __device__ __forceinline__ void transpose(Weights& weights) {
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      weights[e][e] = gpu::transpose(weights[e][e]);
#pragma unroll
      for (int j = e + 1; j < kEights; ++j) {
        const uint32_t other = gpu::transpose(weights[j][e]);
        weights[j][e] = gpu::transpose(weights[e][j]);
        weights[e][j] = other;
      }
    }
  }

  // Writes factor * weights * x to the rows of a tensor. Returns the sum of all.
  __device__ __forceinline__ float write(Slot slot, const Weights& weights, const Matrix& x,
                                         const float (&factor)[kEights]) const {
    float all = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Sums sums;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int pair = 0; pair < kEights / 2; ++pair)
          sums[pair][i][0] = sums[pair][i][1] = sums[pair][i][2] = sums[pair][i][3] = 0.0f;
#pragma unroll
        for (int keys = 0; keys < kEights; keys += 2) {
          const uint32_t low = gpu::transpose(x[keys][part][i]), high = gpu::transpose(x[keys + 1][part][i]);
#pragma unroll
          for (int pair = 0; pair < kEights / 2; ++pair) {
            const auto &upper = weights[2 * pair], &lower = weights[2 * pair + 1];
            const uint32_t rows[4] = {upper[keys], lower[keys], upper[keys + 1], lower[keys + 1]};
            gpu::mma_16x8x16<T>(sums[pair][i], rows, low, high, sums[pair][i]);
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float first = sums[e / 2][i][e % 2 * 2] * factor[e];
          const float second = sums[e / 2][i][e % 2 * 2 + 1] * factor[e];
          all += first, all += second;
          words[i] = gpu::pack<T>(first, second);
        }
        if (token_[e] < 0) continue;
        write_piece(row(slot, e), 4 * part + lane % 4, int(a.call.head_dim), a.unit,
                    make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
    return all;
  }

  const ShortArguments& a;
  const int lane = int(threadIdx.x % 32);
  int head_;
  int clip_[kEights], token_[kEights];
  uint32_t visible_[kEights];  // bit 8 j + i: this lane's key i of eight j
};

// Runs a pass of a tile. What is not finite makes NaN of the weight 0 of another sequence, so then the sequences of the
// tile take turns.
template <class Pass>
__device__ __forceinline__ void run_tile(const ShortArguments& a, Pass pass) {
  const int tile = int(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
  if (tile >= a.tiles) return;
#pragma unroll 1
  for (int only = -1; only < a.per_tile; ++only) {
    const bool bad = pass(tile, only);
    if (only == -1 && (a.per_tile == 1 || !__any_sync(~0u, bad))) return;
  }
}

}  // namespace vidattn::cuda
