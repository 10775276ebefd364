// From an op's dtype and the machine to the kernels that run, and from their tasks to threads.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "call.h"
#include "isa.h"
#include "scratch.h"

namespace vidattn {

inline Element element_of(const torch::stable::Tensor& t) {
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

// The kernels of the current instruction set. avx512bf16 has some for bfloat16 alone.
template <class Kernels>
const Kernels& kernels_for(Element element, const KernelTable<Kernels>& baseline, const KernelTable<Kernels>& avx2,
                           const KernelTable<Kernels>& avx512, const Kernels& avx512bf16) {
  const Isa isa = current_isa();
  if (element == Element::bfloat16 && isa == Isa::avx512_bf16) return avx512bf16;
  const KernelTable<Kernels>& table = isa >= Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : baseline;
  return element == Element::float64 ? table.float64 : table.float32;
}

// Runs task_range(args, begin, end, scratch) over [0, tasks) on all threads.
template <class Args, class Kernels, class F>
void run(const Args& args, const Kernels& kernels, bool backward, int64_t tasks, F task_range) {
  const int64_t bytes = kernels.scratch_bytes(args, backward);
  torch::stable::parallel_for(0, tasks, 1,
                              [&](int64_t begin, int64_t end) { task_range(args, begin, end, thread_scratch(bytes)); });
}

}  // namespace vidattn
