#pragma once
#include "attention_products.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P>
void Attention<P>::backward(Group<P>& group) {
  start_group(group);
  pack_in_lanes(group, kK, keys_in_lanes_);
  pack_in_lanes(group, kV, values_in_lanes_);
  pack_in_rows(group, kK, keys_in_rows_);
  group.keys_packed();
  for (int64_t i = 0; i < tiles_ * kWidth * padded_; ++i) dk_[i] = dv_[i] = 0;
  const int64_t blocks = ceil_div(group.queries, kQueryRows), passes = ceil_div(group.queries, kRows);
  start_fetching(2 * blocks * tiles_ + passes * tiles_ * columns() + blocks * columns());
  for (int64_t first = 0; first < group.queries; first += kRows) {
    const int64_t left = group.queries - first;
    backward_rows(group, first, left < kRows ? left : kRows);
  }
  group.write(kDk, 0, n_, dk_, padded_, scale_);
  group.write(kDv, 0, n_, dv_, padded_, T(1));
}

// Queries [first, first + count): their gradients, and what they add to those of the keys and values.
template <class P>
void Attention<P>::backward_rows(Group<P>& group, int64_t first, int64_t count) {
  const int64_t padded = round_up(count, kQueryRows);
  load_rows(group, kQ, first, count, padded, q_, q_in_rows_);
  load_rows(group, kDout, first, count, padded, dout_, dout_in_rows_);
  group.fetch_to_write(kDq, first, count);
  start_block(group, first, count, padded);

  Vec<T> top[kRows];
  for (auto& t : top) t = splat(-kInfinity);
  for_each_tile([&](int64_t tile, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    for_each_block(count, [&](int64_t r, auto rows) {
      fetch_ahead(group, kDout);
      this->template multiply_rows<decltype(rows)::value, NV>(q_, keys_in_lanes_, r, tile, scores_, top);
    });
  });
  for_each_tile([&](int64_t tile, auto vectors) {  // gradients of the weights
    constexpr int NV = decltype(vectors)::value;
    for_each_block(count, [&](int64_t r, auto rows) {
      fetch_ahead(group, kDout);
      this->template multiply_rows<decltype(rows)::value, NV>(dout_, values_in_lanes_, r, tile, dscores_, nullptr);
    });
  });
  for (int64_t r = 0; r < count; r += P::pack) {
    if (P::pack == 2 && r + 1 < count)
      softmax_gradient<2>(group, first, r, top);
    else
      softmax_gradient<1>(group, first, r, top);
  }
  const bool last = first + count == group.queries;
  for_each_tile([&](int64_t tile, auto) {
    const int64_t key = tile * kWidth, keys = n_ - key < kWidth ? n_ - key : kWidth;
    if (last)  // the gradients of these keys are complete, and soon written
      for (Slot slot : {kDk, kDv}) group.fetch_to_write(slot, key, keys);
    for_each_column([&](int64_t c, auto vectors) {
      fetch_ahead(group, kDout);
      this->template add_key_gradients<decltype(vectors)::value>(tile, c, count);
    });
  });

  T scales[kQueryRows];
  for (auto& s : scales) s = scale_;
  for_each_block(count, [&](int64_t r, auto rows) {
    constexpr int R = decltype(rows)::value;
    alignas(64) T dq[R * kMaxDim];
    for_each_column([&](int64_t c, auto vectors) {
      fetch_ahead(group, kDout);
      this->template sum_over_keys<R, decltype(vectors)::value>(dscores_, keys_in_rows_, r, c, scales, dq);
    });
    group.write(kDq, first + r, count - r < R ? count - r : R, dq, padded_, T(1));
  });
}

// For R rows in work from r on: with scores s and gradients g of the weights at hand, P = softmax(s) and
// dS = P (g - sum(P g)). Words that pair two rows (R is 2, or the second is zeros) take the rows' places: in the score
// panel the pairs of P and of dS, in the other dS itself as words along the keys. The exponentials are full ones also
// where words are rounded: the gradient of a bias is not.
template <class P>
template <int R>
void Attention<P>::softmax_gradient(const Group<P>& group, int64_t first, int64_t r, const Vec<T>* top) {
  const bool drop = dropout_.p > 0;
  T inverse[R], delta[R];
  for (int i = 0; i < R; ++i) {
    T m = largest<T>(top[r + i]);
    if (m == -kInfinity) m = 0;  // a fully masked row: all weights become 0, not NaN
    T* const keep = keep_ + i * tiles_ * kWidth;
    if (drop) dropout_.factors(0, tiles_ * kWidth, group.position(first + r + i), group.head, group.index, keep);
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
  for_each_tile([&](int64_t tile, auto vectors) {
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
        if (T* to = queries_[r + i].gradient)
          store_first(to + key, load_first(to + key, n_ - key) + ds[i][n], n_ - key);
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

// dV += P^T dO and dK += dS^T Q, for the keys of a tile and NV vectors of channels: in blocks of about one size.
template <class P>
template <int NV>
void Attention<P>::add_key_gradients(int64_t tile, int64_t c, int64_t count) {
  constexpr int blocks = ceil_div(kWidth, kQueryRows), small = kWidth / blocks, num_large = kWidth % blocks;
  const int64_t first = tile * kWidth, small_ones = first + num_large * (small + 1);
  for (int64_t key = first; key < small_ones && key < n_; key += small + 1)
    add_block_of_key_gradients<small + 1, NV>(tile, key, c, count);
  for (int64_t key = small_ones; key < first + kWidth && key < n_; key += small)
    add_block_of_key_gradients<small, NV>(tile, key, c, count);
}

template <class P>
template <int R, int NV>
VIDATTN_INLINE void Attention<P>::add_block_of_key_gradients(int64_t tile, int64_t key, int64_t c, int64_t count) {
  const Word* weights = (const Word*)panel(scores_, tile, 0);
  const Word* dscores = P::pack == 1 ? (const Word*)panel(dscores_, tile, 0) : weights + kWidth;
  for (int product = 0; product < 2; ++product) {
    T* to = (product ? dk_ : dv_) + key * padded_ + c;
    Vec<T> g[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) g[r][n] = load(to + r * padded_ + n * kLanes<T>);
    multiply_tile<P, R, NV, 1>((product ? dscores : weights) + key - tile * kWidth, P::pack * kWidth,
                               in_column(product ? q_in_rows_ : dout_in_rows_, c, kRows), NV * kLanes<Word>,
                               ceil_div(count, P::pack), g);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) store(to + r * padded_ + n * kLanes<T>, g[r][n]);
  }
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
