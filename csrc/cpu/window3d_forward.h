#pragma once
#include "window3d.h"

namespace vidattn {
namespace VIDATTN_ISA {

// Turns the scores of one query row into weights e^(score - m), times the dropout factor, and returns the sums over the
// lanes of the undropped ones.
template <class P, class In>
VIDATTN_INLINE Vec<typename P::Acc> Window3d<P, In>::softmax_row(int r, int64_t i, T m) {
  const bool drop = dropout_.p > 0;
  T *const keep = keep_, *const scores = scores_;
  if (drop) dropout_.factors(0, tiles_ * kWidth, i, head_, now_->group(), keep_);
  Vec<T> total[2] = {};
  for_each_tile([&](int64_t tile, auto vectors, auto) {
    constexpr int NV = decltype(vectors)::value;
    T* s = scores + (tile * kQueryRows + r) * kWidth;
    Vec<T> p[2] = {};
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) {
      p[n] = exp<typename P::Exp, T>(load(s + n * kLanes<T>) - m);
      total[n] += p[n];
      if (drop) p[n] *= load(keep + tile * kWidth + n * kLanes<T>);
      if (P::pack == 1) store(s + n * kLanes<T>, p[n]);
    }
    if constexpr (P::pack == 2) store(weights_ + (tile * kQueryRows + r) * kWords, P::narrow(p[0], p[1]));
  });
  return total[0] + total[1];
}

template <class P, class In>
void Window3d<P, In>::forward_block(const Tokens& q, const Tokens& out, int64_t first) {
  const int count = int(now_->query_count() - first < kQueryRows ? now_->query_count() - first : kQueryRows);
  for (int r = 0; r < kQueryRows; ++r) {  // a short last block repeats its first query and drops the result
    const int64_t i = now_->query(first + (r < count ? r : 0));
    P::row_words(q.row(i), d_, padded_, q_ + r * kMaxDim);
    bias_row_[r] = bias_ + bias_offset_[i];
    mask_row_[r] = now_->mask_row(i);
  }
  choose_tiles(first, count);
  Vec<T> top[kQueryRows];
  for (auto& t : top) t = splat(-kInfinity);
  for_each_tile([&](int64_t tile, auto vectors, auto tail) {
    constexpr int NV = decltype(vectors)::value;
    Vec<T> s[kQueryRows][NV];
    score_tile<NV, decltype(tail)::value>(q_, tile, bias_row_, mask_row_, s);
    T* to = scores_ + tile * kQueryRows * kWidth;
#pragma GCC unroll 16
    for (int r = 0; r < kQueryRows; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) {
        store(to + r * kWidth + n * kLanes<T>, s[r][n]);
        top[r] = max<T>(top[r], s[r][n]);
      }
  });
  // Three loops, so that the latency of one row's reductions hides behind the other rows'.
  T m[kQueryRows], inverse[kQueryRows];
  for (int r = 0; r < count; ++r) {
    m[r] = largest<T>(top[r]);
    if (m[r] == -kInfinity) m[r] = 0;  // a fully masked row: all weights become 0, not NaN
  }
  for (int r = 0; r < count; ++r) top[r] = softmax_row(r, now_->query(first + r), m[r]);
  for (int r = 0; r < count; ++r) {
    const T total = sum<T>(top[r]);
    inverse[r] = total == 0 ? T(0) : 1 / total;
    ((T*)a_.lse)[now_->token(now_->query(first + r)) * a_.heads + head_] = m[r] + log(total);
  }
  const Word* weights = P::pack == 1 ? (const Word*)scores_ : weights_;
  for_each_column([&](int64_t c, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    Vec<T> o[kQueryRows][NV];
    clear(o);
    for (int64_t tile = first_tile_; tile < last_tile_; ++tile)
      multiply_tile<P, kQueryRows, NV, kWords>(weights + tile * kQueryRows * kWords, 1,
                                               values_in_rows_ + tile * kWords * padded_ + c, padded_,
                                               steps_in_tile(tile), o);
#pragma GCC unroll 16
    for (int r = 0; r < kQueryRows; ++r)
      if (r < count) {
        T row[NV * kLanes<T>];
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) store(row + n * kLanes<T>, o[r][n]);
        const int64_t left = d_ - c;
        narrow_row(row, inverse[r], out.row(now_->query(first + r)) + c, left < NV * kLanes<T> ? left : NV * kLanes<T>);
      }
  });
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
