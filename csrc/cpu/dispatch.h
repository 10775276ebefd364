// What the native ops of all families do: read their arguments, find the kernels of the machine, and spread tasks over
// threads.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "call.h"
#include "isa.h"
#include "scratch.h"

namespace vidattn {

// The arguments of an op, one after the other; all of them have to be taken.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : stack_(stack) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(stack_[next_++]);
  }

 private:
  StableIValue* const stack_;
  int64_t next_ = 0;
};

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

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

// Reads what the arguments of every family have: the type and shape of q, and dropout.
template <class Call, class Args>
void read_common(const Call& call, Args& a) {
  STD_TORCH_CHECK(call.q.scalar_type() == call.k.scalar_type() && call.q.scalar_type() == call.v.scalar_type(),
                  "expected q, k and v of one dtype");
  a.element = element_of(call.q);
  a.heads = call.q.size(-2), a.head_dim = call.q.size(-1);
  STD_TORCH_CHECK(a.head_dim >= 1 && a.head_dim <= 128, "expected head_dim between 1 and 128, got ", a.head_dim);
  a.scale = call.scale, a.dropout_p = call.dropout_p;
  if (a.dropout_p > 0) {
    STD_TORCH_CHECK(call.seed.has_value(), "dropout needs a seed");
    a.seed = static_cast<uint64_t>(*call.seed->template const_data_ptr<int64_t>());
  }
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
