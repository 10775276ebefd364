// Rows of 16-bit elements in shared memory, and the fragments of matrices that the tensor cores take from them.
//
// A row holds kDim elements in pieces of 16 bytes. The piece is rotated by the row, so that the eight rows that one
// ldmatrix reads at a time lie in different banks.
#pragma once
#include <primitives.cuh>

#include "call.h"

namespace vidattn::cuda {

constexpr int kPadding = -1, kNoToken = -2;  // numbers of what is no token: padding of a group, and nothing at all

template <int kElements>
struct Rows {
  static_assert(kElements == 32 || kElements == 64, "written for rows of 64 or 128 bytes");
  static constexpr int kDim = kElements;
  static constexpr int kBytes = 2 * kDim, kPieces = kBytes / 16;

  static __device__ __forceinline__ uint32_t place(int row, int piece) {
    return uint32_t(row * kBytes + ((piece ^ (kDim == 32 ? row >> 1 & 3 : row & 7)) << 4));
  }
};

// Eight elements from `first` on of a row of `dim` elements, as four words; zeros behind the end.
__device__ __forceinline__ void load_piece(uint32_t (&words)[4], const char* row, int first, int dim) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = first + 2 * i;
    const uint16_t* element = reinterpret_cast<const uint16_t*>(row) + at;
    const uint32_t low = row && at < dim ? element[0] : 0, high = row && at + 1 < dim ? element[1] : 0;
    words[i] = low | high << 16;
  }
}

// Copies one piece into shared memory, zeros for row == null and behind the end. `unit` is the number of bytes that
// every row and dim are a multiple of: 16, 4 or 2. `readable` is any address of the tensor.
__device__ __forceinline__ void copy_piece_of_row(unsigned char* to, const char* row, int piece, int dim, int unit,
                                                  const char* readable) {
  if (unit == 16) {
    const bool valid = row && piece * 8 < dim;
    gpu::cp_async_16(gpu::shared_address(to), valid ? row + piece * 16 : readable, valid);
  } else if (unit == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool valid = row && piece * 8 + 2 * i < dim;
      gpu::cp_async_4(gpu::shared_address(to + 4 * i), valid ? row + piece * 16 + 4 * i : readable, valid);
    }
  } else {
    uint32_t words[4];
    load_piece(words, row, piece * 8, dim);
    gpu::store_shared(gpu::shared_address(to), make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// What tokens have that lie one distance apart.
template <class Entry>
struct PlainRows {
  Entry* first;  // of token 0
  uint32_t stride;

  __device__ __forceinline__ Entry* at(int token) const { return first + uint64_t(uint32_t(token)) * stride; }
};

// Rows of a tensor that lie one distance apart: the piece of each that a thread copies, 16 whole bytes.
struct PieceOfRows {
  const char *first, *padding;  // of token 0; of a token below 0
  uint32_t stride;              // bytes
  int least;                    // tokens below it have zeros

  __device__ __forceinline__ void copy(unsigned char* shared, int token) const {
    const char* from = first + uint64_t(uint32_t(token)) * stride;
    if (token < 0) from = padding;
    gpu::cp_async_16(gpu::shared_address(shared), from, token >= least);
  }
};

// Starts to copy rows of two tensors into shared memory, those of `count` tokens from `first` on, and zeros up to
// `rows` rows; by so many threads, of which this is one.
template <int kDim, class Group>
__device__ __forceinline__ void copy_rows(const Group& group, Slot x, Slot y, int first, int count, int rows,
                                          unsigned char* to_x, unsigned char* to_y, int thread, int threads) {
  using Layout = Rows<kDim>;
  const int step = threads / Layout::kPieces, piece = thread % Layout::kPieces;
  int row = thread / Layout::kPieces;
  if (group.is_plain(x) && group.is_plain(y)) {
    const auto from_x = group.piece(x, piece), from_y = group.piece(y, piece);
    const auto tokens = group.tokens() + first;
    uint32_t place = Layout::place(row, piece);
#pragma unroll 4
    for (; row < rows; row += step) {
      if constexpr (kDim != 32) place = Layout::place(row, piece);
      const int token = row < count ? tokens[row] : kNoToken;
      from_x.copy(to_x + place, token), from_y.copy(to_y + place, token);
      if constexpr (kDim == 32) place += step * Layout::kBytes;  // a multiple of 8 rows
    }
  } else {
#pragma unroll 1
    for (; row < rows; row += step) {
      const uint32_t place = Layout::place(row, piece);
      const bool inside = row < count;
      group.copy_piece(x, inside ? first + row : kNoToken, piece, to_x + place);
      group.copy_piece(y, inside ? first + row : kNoToken, piece, to_y + place);
    }
  }
}

// The same of one tensor.
template <int kDim, class Group>
__device__ __forceinline__ void copy_rows(const Group& group, Slot x, int first, int count, int rows, unsigned char* to,
                                          int thread, int threads) {
  using Layout = Rows<kDim>;
  const int step = threads / Layout::kPieces, piece = thread % Layout::kPieces;
  int row = thread / Layout::kPieces;
  if (group.is_plain(x)) {
    const auto from = group.piece(x, piece);
    const auto tokens = group.tokens() + first;
#pragma unroll 4
    for (; row < rows; row += step) from.copy(to + Layout::place(row, piece), row < count ? tokens[row] : kNoToken);
  } else {
#pragma unroll 1
    for (; row < rows; row += step)
      group.copy_piece(x, row < count ? first + row : kNoToken, piece, to + Layout::place(row, piece));
  }
}

// Two neighbouring elements of a row of `dim`; the row's start is a multiple of `unit` bytes.
__device__ __forceinline__ void write_pair(char* row, int at, int dim, int unit, uint32_t pair) {
  uint16_t* element = reinterpret_cast<uint16_t*>(row) + at;
  if (unit >= 4) {
    if (at < dim) *reinterpret_cast<uint32_t*>(element) = pair;
  } else {
    if (at < dim) element[0] = uint16_t(pair);
    if (at + 1 < dim) element[1] = uint16_t(pair >> 16);
  }
}

// Writes one piece of a row of `dim` elements, which starts at a multiple of `unit` bytes.
__device__ __forceinline__ void write_piece(char* row, int piece, int dim, int unit, const uint4& words) {
  if (unit == 16) {
    if (piece * 8 < dim) *reinterpret_cast<uint4*>(row + piece * 16) = words;
    return;
  }
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) write_pair(row, piece * 8 + 2 * i, dim, unit, pairs[i]);
}

// The A operand of 16 queries straight from global memory: this lane's part of rows `low` and `high` (null for zeros).
// A lane's word is two neighbouring elements; each query is read once, so shared memory would not help.
template <int kDim>
__device__ __forceinline__ void load_queries(uint32_t (&q)[kDim / 16][4], const char* low, const char* high, int dim,
                                             int unit, int thread = threadIdx.x) {
  const int column = thread % 4 * 2;
  const auto load = [&](auto word_at) {
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const char* row = part % 2 ? high : low;
        const int at = i * 16 + part / 2 * 8 + column;
        q[i][part] = row && at < dim ? word_at(row + 2 * at, at) : 0;
      }
  };
  if (unit >= 4) {
    load([](const char* element, int) { return *reinterpret_cast<const uint32_t*>(element); });
  } else {
    load([&](const char* element, int at) {
      const uint16_t* pair = reinterpret_cast<const uint16_t*>(element);
      return pair[0] | (at + 1 < dim ? uint32_t(pair[1]) << 16 : 0);
    });
  }
}

// The two elements of a word.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) {
  const uint16_t bits[2] = {uint16_t(word), uint16_t(word >> 16)};
  return make_float2(__half2float(reinterpret_cast<const __half&>(bits[0])),
                     __half2float(reinterpret_cast<const __half&>(bits[1])));
}

// The sum of the squares of the two elements of a word.
template <class T>
__device__ __forceinline__ float square_sum(uint32_t word) {
  const float2 x = unpack<T>(word);
  return fmaf(x.x, x.x, x.y * x.y);
}

// The square of the length of a row in shared memory.
template <class T, int kDim>
__device__ __forceinline__ float square_length(const unsigned char* row) {
  float sum = 0.0f;
#pragma unroll
  for (int piece = 0; piece < kDim / 8; ++piece) {  // the order does not matter, so they need not be found
    const uint4 words = gpu::load_shared<uint4>(
        gpu::shared_address(row + 16 * ((piece + threadIdx.x / (kDim == 32 ? 2 : 1)) % (kDim / 8))));
    sum += square_sum<T>(words.x) + square_sum<T>(words.y) + square_sum<T>(words.z) + square_sum<T>(words.w);
  }
  return sum;
}

}  // namespace vidattn::cuda
