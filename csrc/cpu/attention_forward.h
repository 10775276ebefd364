#pragma once
#include "attention.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class P, class In>
template <class G>
void Attention<P, In>::forward(G& group) {
  pack_in_lanes(group, kK, keys_in_lanes_);
  pack_in_rows(group, kV, values_in_rows_);
  group.keys_packed();
  start_fetching(ceil_div(group.query_count(), kQueryRows) * (tiles_ + columns()));
  for_each_block(group.query_count(),
                 [&](int64_t first, auto rows) { this->template forward_block<decltype(rows)::value>(group, first); });
}

// R queries from the first on; those beyond the last query are zeros, and their results are dropped.
template <class P, class In>
template <int R, class G>
void Attention<P, In>::forward_block(G& group, int64_t first) {
  const int count = int(group.query_count() - first < R ? group.query_count() - first : R);
  for (int r = 0; r < R; ++r) {
    const int64_t i = group.query(first + (r < count ? r : 0));
    row_words<P>(r < count ? group.row(kQ, i) : kZeros<In>, d_, q_ + r * kMaxDim);
    group.set_row(r, i);
    group.expect(kOut, i);
  }
  range_ = group.choose_tiles(first, count);
  Vec<T> top[R];
  for (auto& t : top) t = splat(-kInfinity);
  for_each_tile([&](int64_t tile, auto vectors, auto tail) {
    fetch_ahead(group, kV);
    this->template score_tile<R, decltype(vectors)::value, decltype(tail)::value>(group, 0, tile, top);
  });
  // Three loops, so that the latency of one row's reductions hides behind the other rows'.
  T m[R], inverse[R];
  for (int r = 0; r < count; ++r) {
    m[r] = largest<T>(top[r]);
    if (m[r] == -kInfinity) m[r] = 0;  // a fully masked row: all weights become 0, not NaN
  }
  const bool drop = dropout_.p > 0;
  T* const keep = keep_;
  for (int r = 0; r < count; ++r) {
    if (drop) dropout_.factors(0, tiles_ * kWidth, group.query(first + r), group.head(), group.index(), keep);
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
    const T total = sum<T>(top[r]);
    inverse[r] = total == 0 ? T(0) : 1 / total;
    group.keep_lse(group.query(first + r), m[r], total);
  }
  for_each_column([&](int64_t c, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    fetch_ahead(group, kV);
    Vec<T> o[R][NV];
    clear(o);
    for (int64_t tile = range_.first; tile < range_.last; ++tile)
      multiply_tile<P, R, NV, kWidth>((const Word*)panel(scores_, tile, 0), 1,
                                      values_in_rows_ + tile * kWords * padded_ + c, padded_, steps_in_tile(tile), o);
    const int64_t left = d_ - c < NV * kLanes<T> ? d_ - c : NV * kLanes<T>;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      if (r < count) {
        T row[NV * kLanes<T>];
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) store(row + n * kLanes<T>, o[r][n]);
        group.put(kOut, group.query(first + r), c, row, inverse[r], left);
      }
  });
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
