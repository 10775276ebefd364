// How the native ops of all devices read their arguments.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "call.h"

namespace vidattn {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// The arguments of an op, one after the other; all of them have to be taken. Keeps the tensors alive.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : stack_(stack) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*stack_++);
  }
  const Tensor& tensor() { return tensors_.emplace_back(take<Tensor>()); }
  // Of those that have been taken.
  const Tensor& first() const { return tensors_.front(); }
  // Null for None.
  const Tensor* maybe_tensor() {
    auto given = take<std::optional<Tensor>>();
    return given ? &tensors_.emplace_back(*std::move(given)) : nullptr;
  }

 private:
  StableIValue* stack_;
  std::deque<Tensor> tensors_;  // which stay where they are
};

inline Element element_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::Double:
      return Element::float64;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

// (B, rows, h, d), or its last two dimensions merged; from row `first` on.
inline RowTensor row_tensor(const Tensor& t, int64_t head_dim, int64_t first = 0) {
  STD_TORCH_CHECK(t.stride(-1) == 1 || t.size(-1) == 1, "the last dimension must be contiguous");
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  return {static_cast<char*>(t.data_ptr()) + first * t.stride(1) * bytes,
          {t.stride(0) * bytes, t.stride(1) * bytes, (t.dim() == 3 ? head_dim : t.stride(-2)) * bytes}};
}

// What the arguments of every family begin with, and the gradients of that: q, k and v, or one tensor (..., 3, h, d).
class Tokens {
 public:
  explicit Tokens(Arguments& from) : q(from.tensor()), k_(from.maybe_tensor()), v_(from.maybe_tensor()) {
    STD_TORCH_CHECK(!k_ == !v_, "expected both k and v, or none of them");
    STD_TORCH_CHECK(!k_ || (q.scalar_type() == k_->scalar_type() && q.scalar_type() == v_->scalar_type()),
                    "expected q, k and v of one dtype");
    STD_TORCH_CHECK(k_ || (q.dim() >= 3 && q.size(-3) == 3), "expected three of each row in a packed tensor");
  }
  // Dimensions of each of the three.
  int64_t dim() const { return q.dim() - !k_; }

  // Lets `view` read each of them into a slot, the next ones after the first.
  template <class View, class F>
  void read(View* first, F view) const {
    const Tensor* const tensors[] = {&q, k_ ? k_ : &q, v_ ? v_ : &q};
    for (int i = 0; i < 3; ++i) {
      first[i] = view(*tensors[i]);
      if (!k_) first[i].data += i * q.stride(-3) * static_cast<int64_t>(q.element_size());
    }
  }

  const Tensor& q;  // or the packed one

 private:
  const Tensor *k_, *v_;
};

template <class Args>
void set_shape(Args& a, const Tensor& q) {
  a.element = element_of(q);
  a.heads = q.size(-2), a.head_dim = q.size(-1);
  STD_TORCH_CHECK(a.head_dim >= 1 && a.head_dim <= 128, "expected head_dim between 1 and 128, got ", a.head_dim);
}

}  // namespace vidattn
