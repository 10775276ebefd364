#pragma once
#include "attention.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P, class In>
template <class G>
void Attention<P, In>::backward(G& group) {
  pack_in_lanes(group, kK, keys_in_lanes_);
  pack_in_lanes(group, kV, values_in_lanes_);
  pack_in_rows(group, kK, keys_in_rows_);
  group.keys_packed();
  for (int64_t i = 0; i < round_up(n_, kKeyRows) * padded_; ++i) dk_[i] = dv_[i] = 0;
  const int64_t blocks = ceil_div(group.query_count(), kQueryRows), passes = ceil_div(group.query_count(), kRows);
  start_fetching(2 * blocks * tiles_ + passes * ceil_div(n_, kKeyRows) * columns() + blocks * columns());
  for (int64_t first = 0; first < group.query_count(); first += kRows) {
    const int64_t left = group.query_count() - first;
    backward_rows(group, first, left < kRows ? left : kRows);
  }
  for (int64_t j = 0; j < n_; ++j) {
    if (j + 8 < n_) group.expect(kDk, j + 8), group.expect(kDv, j + 8);
    group.put(kDk, j, 0, dk_ + j * padded_, scale_, d_);
    group.put(kDv, j, 0, dv_ + j * padded_, T(1), d_);
  }
}

// Queries [first, first + count): their gradients, and what they add to those of the keys and values.
template <class P, class In>
template <class G>
void Attention<P, In>::backward_rows(G& group, int64_t first, int64_t count) {
  const In *query[kRows], *gradient[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    const bool real = r < count;
    const int64_t i = group.query(first + (real ? r : 0));
    query[r] = real ? group.row(kQ, i) : kZeros<In>;
    gradient[r] = real ? group.row(kDout, i) : kZeros<In>;
    if (r >= round_up(count, kQueryRows)) continue;
    row_words<P>(query[r], d_, q_ + r * kMaxDim);
    row_words<P>(gradient[r], d_, dout_ + r * kMaxDim);
    group.set_row(r, i);
    group.expect(kDq, i);
  }
  for (int64_t r = 0; r < count; r += P::pack) {
    P::column_words(query + r, d_, padded_, q_in_rows_ + r / P::pack * padded_);
    P::column_words(gradient + r, d_, padded_, dout_in_rows_ + r / P::pack * padded_);
  }

  range_ = group.choose_tiles(first, count);
  Vec<T> top[kRows];
  for (auto& t : top) t = splat(-kInfinity);
  for_each_tile([&](int64_t tile, auto vectors, auto tail) {
    constexpr int NV = decltype(vectors)::value;
    for_each_block(count, [&](int64_t r, auto rows) {
      fetch_ahead(group, kDout);
      this->template score_tile<decltype(rows)::value, NV, decltype(tail)::value>(group, r, tile, top + r);
    });
  });
  for_each_tile([&](int64_t tile, auto vectors, auto) {  // gradients of the weights
    constexpr int NV = decltype(vectors)::value;
    for_each_block(count, [&](int64_t r, auto rows) {
      constexpr int R = decltype(rows)::value;
      fetch_ahead(group, kDout);
      Vec<T> s[R][NV];
      clear(s);
      multiply_tile<P, R, NV, kMaxDim>(dout_ + r * kMaxDim, 1, values_in_lanes_ + tile * kWidth * steps_, kWidth,
                                       steps_, s);
      T* to = panel(dscores_, tile, r);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) store(to + i * kWidth + n * kLanes<T>, s[i][n]);
    });
  });
  for (int64_t r = 0; r < count; r += P::pack) {
    if (P::pack == 2 && r + 1 < count)
      softmax_gradient<2>(group, first, r, top);
    else
      softmax_gradient<1>(group, first, r, top);
  }
  for_each_tile([&](int64_t tile, auto, auto) { add_key_gradients(group, tile, count); });

  for_each_block(count, [&](int64_t r, auto rows) {
    constexpr int R = decltype(rows)::value;
    for_each_column([&](int64_t c, auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      fetch_ahead(group, kDout);
      Vec<T> g[R][NV];
      clear(g);
      for (int64_t tile = range_.first; tile < range_.last; ++tile)
        multiply_tile<P, R, NV, kWidth>((const Word*)panel(dscores_, tile, r), 1,
                                        keys_in_rows_ + tile * kWords * padded_ + c, padded_, steps_in_tile(tile), g);
      const int64_t left = d_ - c < NV * kLanes<T> ? d_ - c : NV * kLanes<T>;
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
        if (r + i < count) {
          T row[NV * kLanes<T>];
#pragma GCC unroll 2
          for (int n = 0; n < NV; ++n) store(row + n * kLanes<T>, g[i][n]);
          group.put(kDq, group.query(first + r + i), c, row, scale_, left);
        }
    });
  });
}

// For R rows in work from r on: with scores s and gradients g of the weights at hand, P = softmax(s) and
// dS = P (g - sum(P g)). Words that pair two rows (R is 2, or the second is zeros) take the rows' places: in the score
// panel the pairs of P and of dS, in the other dS itself as words along the keys. The exponentials are full ones also
// where words are rounded: the gradient of a bias is not.
template <class P, class In>
template <int R, class G>
void Attention<P, In>::softmax_gradient(G& group, int64_t first, int64_t r, const Vec<T>* top) {
  const bool drop = dropout_.p > 0;
  T inverse[R], delta[R];
  for (int i = 0; i < R; ++i) {
    T m = largest<T>(top[r + i]);
    if (m == -kInfinity) m = 0;  // a fully masked row: all weights become 0, not NaN
    T* const keep = keep_ + i * tiles_ * kWidth;
    if (drop) dropout_.factors(0, tiles_ * kWidth, group.query(first + r + i), group.head(), group.index(), keep);
    Vec<T> products[2] = {};
    const Vec<T> sums = exponentials<typename ExpOf<T>::type>(r + i, m, [&](int64_t tile, Vec<T>(&p)[2], auto vectors) {
      T *weight = panel(scores_, tile, r + i), *gradient = panel(dscores_, tile, r + i);
#pragma GCC unroll 2
      for (int n = 0; n < decltype(vectors)::value; ++n) {
        Vec<T> g = load(gradient + n * kLanes<T>);
        if (drop) {
          g *= load(keep + tile * kWidth + n * kLanes<T>);
          store(gradient + n * kLanes<T>, g);
        }
        store(weight + n * kLanes<T>, p[n]);
        products[n] += p[n] * g;
      }
    });
    const T total = sum<T>(sums);
    inverse[i] = total == 0 ? T(0) : 1 / total;
    delta[i] = sum<T>(products[0] + products[1]) * inverse[i];
  }
  for_each_tile([&](int64_t tile, auto vectors, auto) {
    constexpr int NV = decltype(vectors)::value;
    T *weights = panel(scores_, tile, r), *gradients = panel(dscores_, tile, r);
    Vec<T> p[2][2] = {}, ds[2][2] = {};  // [row][vector]
#pragma GCC unroll 2
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) {
        const int64_t at = i * kWidth + n * kLanes<T>, key = tile * kWidth + n * kLanes<T>;
        p[i][n] = load(weights + at) * inverse[i];
        ds[i][n] = p[i][n] * (load(gradients + at) - delta[i]);
        if (drop) p[i][n] *= load(keep_ + i * tiles_ * kWidth + key);
        group.add_score_gradients(r + i, key, n_ - key, ds[i][n]);
      }
    if constexpr (P::pack == 1) {
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) {
        store(weights + n * kLanes<T>, p[0][n]);
        store(gradients + n * kLanes<T>, ds[0][n]);
      }
    } else {
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) {
        store(weights + n * kLanes<T>, P::pair(p[0][n], p[1][n]));
        store(weights + kWidth + n * kLanes<T>, P::pair(ds[0][n], ds[1][n]));
      }
#pragma GCC unroll 2
      for (int i = 0; i < R; ++i) store(gradients + i * kWidth, P::narrow(ds[i][0], ds[i][1]));
    }
  });
}

// dV += P^T dO and dK += dS^T Q for the keys of one tile.
template <class P, class In>
template <class G>
void Attention<P, In>::add_key_gradients(G& group, int64_t tile, int64_t count) {
  const Word* weights = (const Word*)panel(scores_, tile, 0);
  const Word* dscores = P::pack == 1 ? (const Word*)panel(dscores_, tile, 0) : weights + kWidth;
  for (int64_t key = tile * kWidth; key < (tile + 1) * kWidth && key < n_; key += kKeyRows)
    for_each_column([&](int64_t c, auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      fetch_ahead(group, kDout);
      for (int product = 0; product < 2; ++product) {
        T* to = (product ? dk_ : dv_) + key * padded_ + c;
        Vec<T> g[kKeyRows][NV];
#pragma GCC unroll 16
        for (int r = 0; r < kKeyRows; ++r)
#pragma GCC unroll 2
          for (int n = 0; n < NV; ++n) g[r][n] = load(to + r * padded_ + n * kLanes<T>);
        multiply_tile<P, kKeyRows, NV, 1>((product ? dscores : weights) + key - tile * kWidth, P::pack * kWidth,
                                          (product ? q_in_rows_ : dout_in_rows_) + c, padded_, ceil_div(count, P::pack),
                                          g);
#pragma GCC unroll 16
        for (int r = 0; r < kKeyRows; ++r)
#pragma GCC unroll 2
          for (int n = 0; n < NV; ++n) store(to + r * padded_ + n * kLanes<T>, g[r][n]);
      }
    });
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
