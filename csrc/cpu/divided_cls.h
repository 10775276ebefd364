// A cls token whose query sees the whole clip. Its weights are computed first, one a row of the clip; then each
// sequence adds up what its rows have for the token, and what the token has for their gradients goes into the rows in
// the same pass. Of the weights there is one number a row and head, and the tensors are read once more for them.
#pragma once
#include "attention.h"
#include "divided_args.h"

namespace vidattn {
namespace VIDATTN_ISA {

// Calls body with a null pointer to the type of the tensors' elements.
template <class P, class F>
VIDATTN_INLINE void with_element(Element element, F body) {
  using Value = typename P::Value;
  if constexpr (sizeof(Value) == 4) {
    if (element == Element::bfloat16) return body((const bf16*)nullptr);
    if (element == Element::float16) return body((const f16*)nullptr);
  }
  body((const Value*)nullptr);
}

template <class P, class In, class T = typename P::Acc>
VIDATTN_INLINE T dot(const In* x, const In* y, int64_t n) {
  constexpr int step = kLanes<T> * P::pack;
  Vec<T> total{};
  int64_t c = 0;
  for (; c + step <= n; c += step)
    total = P::multiply_add(P::load_words(x + c, step), P::load_words(y + c, step), total);
  if (c < n) total = P::multiply_add(P::load_words(x + c, n - c), P::load_words(y + c, n - c), total);
  return sum<T>(total);
}

// The row of the cls token, which lies in front of the patches.
VIDATTN_INLINE char* cls_row(const DividedArgs& a, Slot slot, int64_t clip, int64_t head) {
  const RowTensor& t = a.tensor[slot];
  return t.data + clip * t.stride[0] + head * t.stride[2] - t.stride[1];
}

// What the cls token's query has for each row of a clip and one head: weights with dropout, or gradients of scores.
template <class T>
VIDATTN_INLINE T* cls_weights(const DividedArgs& a, bool gradients, int64_t clip, int64_t head) {
  return (T*)a.cls_weights + ((gradients * a.batch + clip) * a.heads + head) * a.cls_stride();
}
// The first of a sequence's rows in there; the others follow, position_step apart.
VIDATTN_INLINE int64_t first_row_of(const DividedArgs& a, int64_t group) {
  return 1 + group % a.groups * a.group_step;
}

// What a sequence has for the cls token: which = 0 for its context or the gradient of its query, 1 of its key, 2 of its
// value.
template <class T>
VIDATTN_INLINE T* share_of_group(const DividedArgs& a, void* shares, int64_t which, int64_t group, int64_t head) {
  return (T*)shares + ((which * a.batch * a.groups + group) * a.heads + head) * a.head_dim;
}

// Products of the cls token's query with rows [begin, end) of all clips, and backward of its gradient with the values.
template <class P>
void cls_scores(const DividedArgs& a, bool backward, int64_t begin, int64_t end) {
  using T = typename P::Acc;
  const int64_t row_bytes = a.head_dim * bytes_of(a.element);
  with_element<P>(a.element, [&](auto element) {
    using In = decltype(element);
    for (int gradients = 0; gradients <= backward; ++gradients) {
      const Slot query = gradients ? kDout : kQ, key = gradients ? kV : kK;
      const T factor = gradients ? T(1) : T(a.scale);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t clip = i / a.rows(), row = i % a.rows();
        for (int64_t head = 0; head < a.heads; ++head) {
          const In x = (In)cls_row(a, query, clip, head);
          const char* y = cls_row(a, key, clip, head) + row * a.tensor[key].stride[1];
          fetch_row(y + 2 * a.tensor[key].stride[1], row_bytes);  // perhaps beyond the last one, which does no harm
          cls_weights<T>(a, gradients, clip, head)[row] = factor * dot<Plain<T>>(x, (In)y, a.head_dim);
        }
      }
    }
  });
}

// Turns these into weights and gradients of scores, for clips and heads [begin, end).
template <class P>
void cls_softmax(const DividedArgs& a, bool backward, int64_t begin, int64_t end) {
  using T = typename P::Acc;
  const int64_t stride = a.cls_stride();
  const Dropout dropout{a.dropout_p, a.seed};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t clip = task / a.heads, head = task % a.heads;
    T *p = cls_weights<T>(a, false, clip, head), *g = backward ? cls_weights<T>(a, true, clip, head) : nullptr;
    for (int64_t j = a.rows(); j < stride; ++j) {
      p[j] = -T(__builtin_inf());
      if (g) g[j] = 0;
    }
    Vec<T> tops = load(p), totals{}, products{};
    for (int64_t j = 0; j < stride; j += kLanes<T>) tops = max<T>(tops, load(p + j));
    T top = largest<T>(tops);
    if (top == -T(__builtin_inf())) top = 0;  // all weights become 0, not NaN
    for (int64_t j = 0; j < stride; j += kLanes<T>) {
      const Vec<T> e = exp<typename ExpOf<T>::type, T>(load(p + j) - top);
      totals += e;
      store(p + j, e);
    }
    const T total = sum<T>(totals), inverse = total == 0 ? T(0) : 1 / total;
    alignas(64) T keep[DividedArgs::kClsBlock];
    for (auto& factor : keep) factor = 1;
    // Runs body(row, dropout factors), a vector of rows at a time.
    const auto for_each_row = [&](auto body) __attribute__((always_inline)) {
      for (int64_t j = 0; j < stride; j += DividedArgs::kClsBlock) {
        if (dropout.p > 0) dropout.factors(j, DividedArgs::kClsBlock, 0, head, clip, keep);
        for (int64_t i = 0; i < DividedArgs::kClsBlock; i += kLanes<T>) body(j + i, load(keep + i));
      }
    };
    if (g)
      for_each_row([&](int64_t j, Vec<T> kept) {
        const Vec<T> dropped = load(g + j) * kept;
        products += load(p + j) * dropped;
        store(g + j, dropped);
      });
    const T delta = sum<T>(products) * inverse;
    for_each_row([&](int64_t j, Vec<T> kept) {
      const Vec<T> weight = load(p + j) * inverse;
      if (g) store(g + j, weight * (load(g + j) - delta) * T(a.scale));
      store(p + j, weight * kept);
    });
  }
}

// Adds up what the groups have for the cls tokens of clips and heads [begin, end), in order: the mean of its contexts
// or its context, or its gradients.
template <class P>
void add_groups(const DividedArgs& a, bool backward, int64_t begin, int64_t end) {
  using T = typename P::Acc;
  using Value = typename P::Value;
  for (int64_t task = begin; task < end; ++task)
    for (int which = 0; which < (backward ? 3 : 1); ++which) {
      const int64_t clip = task / a.heads, head = task % a.heads;
      const T* from = share_of_group<T>(a, backward ? a.cls_gradients : a.cls_out, which, clip * a.groups, head);
      double total[kMaxDim] = {};  // there may be many groups
      for (int64_t group = 0; group < a.groups; ++group, from += a.heads * a.head_dim)
        for (int64_t c = 0; c < a.head_dim; ++c) total[c] += from[c];
      if (a.cls_sees_all) {  // and the token for itself
        constexpr Slot others[] = {kK, kQ, kDout};
        const T weight = cls_weights<T>(a, backward && which < 2, clip, head)[0];
        alignas(64) Value spare[kMaxDim];
        const char* other = cls_row(a, backward ? others[which] : kV, clip, head);
        const Value* row = read_row<P>(a.element, other, a.head_dim, spare);
        for (int64_t c = 0; c < a.head_dim; ++c) total[c] += double(weight) * double(widen(row[c]));
      }
      const double frames = backward || a.cls_sees_all ? 1 : double(a.frames);
      T exact[kMaxDim];
      for (int64_t c = 0; c < a.head_dim; ++c) exact[c] = T(total[c] / frames);
      const RowTensor& mean = a.cls_mean;
      char* to = backward         ? cls_row(a, Slot(kDq + which), clip, head)
                 : a.cls_sees_all ? cls_row(a, kOut, clip, head)
                                  : mean.data + clip * mean.stride[0] + head * mean.stride[2];
      write_row<P>(a.element, exact, T(1), to, a.head_dim);
    }
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
