#pragma once
#include "attention_products.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P>
void Attention<P>::forward(Group<P>& group) {
  start_group(group);
  pack_in_lanes(group, kK, keys_in_lanes_);
  pack_in_rows(group, kV, values_in_rows_);
  group.keys_packed();
  start_fetching(ceil_div(group.queries, kQueryRows) * (tiles_ + columns()));
  for_each_block(group.queries,
                 [&](int64_t first, auto rows) { this->template forward_block<decltype(rows)::value>(group, first); });
}

// R queries from the first on; those beyond the last query are zeros, and their results are dropped.
template <class P>
template <int R>
void Attention<P>::forward_block(Group<P>& group, int64_t first) {
  const int count = int(group.queries - first < R ? group.queries - first : R);
  load_rows(group, kQ, first, count, R, q_, nullptr);
  group.fetch_to_write(kOut, first, count);
  start_block(group, first, count, R);
  Vec<T> top[R];
  for (auto& t : top) t = splat(-kInfinity);
  for_each_tile([&](int64_t tile, auto vectors) {
    fetch_ahead(group, kV);
    this->template multiply_rows<R, decltype(vectors)::value>(q_, keys_in_lanes_, 0, tile, scores_, top);
  });
  if constexpr (P::tiles)
    for (int r = 0; r < count; ++r) top[r] = finish_row(r);
  // Three loops, so that the latency of one row's reductions hides behind the other rows'.
  T m[R], total[R], inverse[R] = {};
  for (int r = 0; r < count; ++r) {
    m[r] = largest<T>(top[r]);
    if (m[r] == -kInfinity) m[r] = 0;  // a fully masked row: all weights become 0, not NaN
  }
  const bool drop = dropout_.p > 0;
  T* const keep = keep_;
  for (int r = 0; r < count; ++r) {
    if (drop) dropout_.factors(0, tiles_ * kWidth, group.position(first + r), group.head, group.index, keep);
    top[r] = exponentials<typename P::Exp>(r, m[r], [&](int64_t tile, Vec<T>(&p)[2], auto vectors) {
      T* to = panel(scores_, tile, r);
#pragma GCC unroll 2
      for (int n = 0; n < decltype(vectors)::value; ++n) {
        if (drop) p[n] *= load(keep + tile * kWidth + n * kLanes<T>);
        if constexpr (P::pack == 1) store(to + n * kLanes<T>, p[n]);
      }
      if constexpr (P::pack == 2) store(to, P::narrow(p[0], p[1]));
    });
  }
  for (int r = 0; r < count; ++r) {
    total[r] = sum<T>(top[r]);
    inverse[r] = total[r] == 0 ? T(0) : 1 / total[r];
  }
  group.keep_lse(first, count, m, total);
  alignas(64) T o[R * kMaxDim];
  for_each_column([&](int64_t c, auto vectors) {
    fetch_ahead(group, kV);
    this->template sum_over_keys<R, decltype(vectors)::value>(scores_, values_in_rows_, 0, c, inverse, o);
  });
  group.write(kOut, first, count, o, padded_, T(1));
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
