#pragma once
#include "window3d.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P, class In>
void Window3d<P, In>::start_gradients(int64_t chunk) {
  dbias_ = nullptr;
  if (a_.dbias_partial) {
    T* partial = (T*)a_.dbias_partial + (chunk * a_.heads + head_) * a_.bias_size;
    for (int64_t i = 0; i < a_.bias_size; ++i) partial[i] = 0;
    dbias_ = a_.bias_is_table ? dexpanded_ : partial;
    for (int64_t i = 0; i < (a_.bias_is_table ? expanded_size_ : 0); ++i) dexpanded_[i] = 0;
  }
  for (int64_t c = 0; c < 2 * d_; ++c) dpad_[c] = 0;
}

template <class P, class In>
void Window3d<P, In>::finish_gradients(int64_t chunk) {
  if (a_.dbias_partial && a_.bias_is_table) {
    T* partial = (T*)a_.dbias_partial + (chunk * a_.heads + head_) * a_.bias_size;
    T* reversed_end = partial + a_.bias_size - 1;
    for_each_run([&](int64_t from, int64_t row, int64_t length) {
      for (int64_t i = 0; i < length; ++i) reversed_end[-(row + i)] += dexpanded_[from + i];
    });
  }
  if (a_.dpad_partial) {
    T* partial = (T*)a_.dpad_partial + (chunk * a_.heads + head_) * 2 * d_;
    for (int64_t c = 0; c < 2 * d_; ++c) partial[c] = dpad_[c];
  }
}

template <class P, class In>
void Window3d<P, In>::backward_window() {
  const Tokens q = tokens(kQ), k = tokens(kK), v = tokens(kV), out = tokens(kOut), dout = tokens(kDout);
  const Tokens dq = tokens(kDq), dk = tokens(kDk), dv = tokens(kDv);
  pack_keys(k);
  pack_in_lanes(v, values_in_lanes_);
  pack_in_rows(k, keys_in_rows_);
  const int64_t keys = tiles_ * kWidth;
  for (int64_t i = 0; i < keys * padded_; ++i) dk_[i] = dv_[i] = 0;
  for (int64_t first = 0; first < now_->query_count(); first += kRows) backward_blocks(q, out, dout, dq, first);

  for (int64_t j = 0; j < n_; ++j) {
    if (now_->real(j)) {
      narrow_row(dk_ + j * padded_, scale_, dk.row(j), d_);
      narrow_row(dv_ + j * padded_, T(1), dv.row(j), d_);
    } else {
      for (int64_t c = 0; c < d_; ++c) {
        dpad_[c] += dk_[j * padded_ + c] * scale_;
        dpad_[d_ + c] += dv_[j * padded_ + c];
      }
    }
  }
}

template <class P, class In>
void Window3d<P, In>::backward_blocks(const Tokens& q, const Tokens& out, const Tokens& dout, const Tokens& dq,
                                      int64_t first) {
  const int count = int(now_->query_count() - first < kRows ? now_->query_count() - first : kRows);
  const int64_t blocks = ceil_div(count, kQueryRows);
  const In* query[kRows];
  const In* gradient[kRows];
  for (int r = 0; r < blocks * kQueryRows; ++r) {  // rows beyond the last query have no weight: lse = +inf, dout = 0
    const bool real = r < count;
    const int64_t i = now_->query(first + (real ? r : 0));
    query[r] = real ? q.row(i) : nullptr;
    gradient[r] = real ? dout.row(i) : nullptr;
    P::row_words(query[r], d_, padded_, q_ + r * kMaxDim);
    P::row_words(gradient[r], d_, padded_, dout_ + r * kMaxDim);
    bias_row_[r] = bias_ + bias_offset_[i];
    mask_row_[r] = now_->mask_row(i);
    dbias_row_[r] = dbias_ && real ? dbias_ + bias_offset_[i] : zero_row_;
    query_of_row_[r] = i;
    lse_[r] = kInfinity;
    delta_[r] = 0;
    if (!real) continue;
    const T lse = ((const T*)a_.lse)[now_->token(i) * a_.heads + head_];
    if (lse != -kInfinity) lse_[r] = lse;
    const In* context = out.row(i);
    for (int64_t c = 0; c < d_; ++c) delta_[r] += widen(gradient[r][c]) * widen(context[c]);
  }
  if constexpr (P::pack == 2)
    for (int64_t r = 0; r < blocks * kQueryRows; r += 2) {
      P::column_words(query + r, d_, padded_, q_pairs_ + r / 2 * padded_);
      P::column_words(gradient + r, d_, padded_, dout_pairs_ + r / 2 * padded_);
    }

  choose_tiles(first, count);
  for_each_tile([&](int64_t tile, auto vectors, auto tail) {
    prefetch(first + kRows * tile / tiles_, first + kRows * (tile + 1) / tiles_, kDout);
    backward_tile<decltype(vectors)::value, decltype(tail)::value>(tile, blocks);
    add_key_gradients(tile, blocks);
  });

  for (int64_t b = 0; b < blocks; ++b)
    for_each_column([&](int64_t c, auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      Vec<T> g[kQueryRows][NV];
      clear(g);
      for (int64_t tile = first_tile_; tile < last_tile_; ++tile)
        multiply_tile<P, kQueryRows, NV, kWords>(dscores_ + (tile * kBlocks + b) * kQueryRows * kWords, 1,
                                                 keys_in_rows_ + tile * kWords * padded_ + c, padded_,
                                                 steps_in_tile(tile), g);
#pragma GCC unroll 16
      for (int r = 0; r < kQueryRows; ++r)
        if (b * kQueryRows + r < count) {
          T row[NV * kLanes<T>];
#pragma GCC unroll 2
          for (int n = 0; n < NV; ++n) store(row + n * kLanes<T>, g[r][n]);
          const int64_t left = d_ - c;
          narrow_row(row, scale_, dq.row(now_->query(first + b * kQueryRows + r)) + c,
                     left < NV * kLanes<T> ? left : NV * kLanes<T>);
        }
    });
}

// Probabilities and score gradients of all query blocks against one tile of keys.
template <class P, class In>
template <int NV, bool Tail>
void Window3d<P, In>::backward_tile(int64_t tile, int64_t blocks) {
  const int64_t first = tile * kWidth, left = n_ - first;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = b * kQueryRows;
    T* p = scores_ + row * kWidth;
    Vec<T> s[kQueryRows][NV];
    score_tile<NV, Tail>(q_ + row * kMaxDim, tile, bias_row_ + row, mask_row_ + row, s);
#pragma GCC unroll 16
    for (int r = 0; r < kQueryRows; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n)
        store(p + r * kWidth + n * kLanes<T>, exp<typename P::Exp, T>(s[r][n] - lse_[row + r]));

    clear(s);
    multiply_tile<P, kQueryRows, NV, kMaxDim>(dout_ + row * kMaxDim, 1, values_in_lanes_ + tile * kWidth * steps_,
                                              kWidth, steps_, s);
    if (dropout_.p > 0) {
      for (int r = 0; r < kQueryRows; ++r)
        dropout_.factors(first, kWidth, query_of_row_[row + r], head_, now_->group(), keep_ + r * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < kQueryRows; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) s[r][n] *= load(keep_ + r * kWidth + n * kLanes<T>);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kQueryRows; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) {
        s[r][n] = load(p + r * kWidth + n * kLanes<T>) * (s[r][n] - delta_[row + r]);
        if (Tail) s[r][n] = keep_first(s[r][n], left - n * kLanes<T>, T(0));
      }
    if (dbias_) {
#pragma GCC unroll 16
      for (int r = 0; r < kQueryRows; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) {
          T* to = dbias_row_[row + r] + first + n * kLanes<T>;
          if (Tail)
            store_first(to, load_first(to, left - n * kLanes<T>) + s[r][n], left - n * kLanes<T>);
          else
            store(to, load(to) + s[r][n]);
        }
    }
    if (dropout_.p > 0) {
      for (int64_t x = 0; x < kQueryRows * kWidth; ++x) p[x] *= keep_[x];
    }
    Word* ds = dscores_ + (tile * kBlocks + b) * kQueryRows * kWords;
    if constexpr (P::pack == 1) {
#pragma GCC unroll 16
      for (int r = 0; r < kQueryRows; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) store(ds + r * kWords + n * kLanes<T>, s[r][n]);
    } else {
      Word* weight_pairs = weight_pairs_ + b * kPairs * kWidth;
      Word* dscore_pairs = dscore_pairs_ + b * kPairs * kWidth;
#pragma GCC unroll 16
      for (int r = 0; r < kQueryRows; r += 2) {
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) {
          const int64_t at = r / 2 * kWidth + n * kLanes<T>;
          store(dscore_pairs + at, P::pair(s[r][n], s[r + 1][n]));
          store(weight_pairs + at,
                P::pair(load(p + r * kWidth + n * kLanes<T>), load(p + (r + 1) * kWidth + n * kLanes<T>)));
        }
        store(ds + r * kWords, P::narrow(s[r][0], NV == 2 ? s[r][NV - 1] : Vec<T>{}));
        store(ds + (r + 1) * kWords, P::narrow(s[r + 1][0], NV == 2 ? s[r + 1][NV - 1] : Vec<T>{}));
      }
    }
  }
}

// dV += P^T dO and dK += dS^T Q for the keys of one tile.
template <class P, class In>
void Window3d<P, In>::add_key_gradients(int64_t tile, int64_t blocks) {
  const bool paired = P::pack == 2;
  const Word* weights = paired ? weight_pairs_ : (const Word*)scores_;
  const Word* dscores = paired ? dscore_pairs_ : dscores_ + tile * kBlocks * kQueryRows * kWords;
  const Word *q = paired ? q_pairs_ : q_, *dout = paired ? dout_pairs_ : dout_;
  const int64_t row_step = paired ? padded_ : kMaxDim;
  for (int64_t key = tile * kWidth; key < (tile + 1) * kWidth && key < n_; key += kKeyRows)
    for_each_column([&](int64_t c, auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      for (int product = 0; product < 2; ++product) {
        T* to = (product ? dk_ : dv_) + key * padded_ + c;
        Vec<T> g[kKeyRows][NV];
#pragma GCC unroll 16
        for (int r = 0; r < kKeyRows; ++r)
#pragma GCC unroll 2
          for (int n = 0; n < NV; ++n) g[r][n] = load(to + r * padded_ + n * kLanes<T>);
        // The blocks lie one behind the other in both operands, so they are one long sum over query rows.
        multiply_tile<P, kKeyRows, NV, 1>((product ? dscores : weights) + key - tile * kWidth, kWidth,
                                          (product ? q : dout) + c, row_step, blocks * kPairs, g);
#pragma GCC unroll 16
        for (int r = 0; r < kKeyRows; ++r)
#pragma GCC unroll 2
          for (int n = 0; n < NV; ++n) store(to + r * padded_ + n * kLanes<T>, g[r][n]);
      }
    });
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
