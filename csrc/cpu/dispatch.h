// What the native ops of all families do: read their arguments, find the kernels of the machine, and spread tasks over
// threads.
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
#include "isa.h"
#include "scratch.h"

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
          {t.stride(0) * bytes, t.stride(1) * bytes, (t.dim() == 3 ? head_dim : t.stride(2)) * bytes}};
}

// What the arguments of every family begin with.
struct Tokens {
  explicit Tokens(Arguments& from) : q(from.tensor()), k(from.tensor()), v(from.tensor()) {
    STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                    "expected q, k and v of one dtype");
  }
  const Tensor &q, &k, &v;
};

template <class Args>
void set_shape(Args& a, const Tensor& q) {
  a.element = element_of(q);
  a.heads = q.size(-2), a.head_dim = q.size(-1);
  STD_TORCH_CHECK(a.head_dim >= 1 && a.head_dim <= 128, "expected head_dim between 1 and 128, got ", a.head_dim);
}

template <class Args>
void set_seed(Args& a, const Tensor* seed) {
  STD_TORCH_CHECK(a.dropout_p == 0 || seed, "dropout needs a seed");
  if (a.dropout_p > 0) a.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
}

// The kernels of the current instruction set, from VIDATTN_KERNELS of the family.
template <class Kernels, size_t N>
const Kernels& kernels_for(Element element, const KernelTable<Kernels>* const (&tables)[N]) {
  for (int isa = current_isa();; --isa) {
    const KernelTable<Kernels>& table = *tables[isa];
    if (element == Element::bfloat16 && table.bfloat16.forward) return table.bfloat16;
    const Kernels& kernels = element == Element::float64 ? table.float64 : table.float32;
    if (kernels.forward) return kernels;
  }
}

// Runs task_range(args, begin, end, scratch) over [0, tasks) on all threads.
template <class Args, class Kernels, class F>
void run(const Args& args, const Kernels& kernels, bool backward, int64_t tasks, F task_range) {
  const int64_t bytes = kernels.scratch_bytes(args, backward);
  torch::stable::parallel_for(0, tasks, 1,
                              [&](int64_t begin, int64_t end) { task_range(args, begin, end, thread_scratch(bytes)); });
}

}  // namespace vidattn
