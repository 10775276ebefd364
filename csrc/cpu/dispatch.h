// From an op's dtype and the machine to the kernels that run, and from their tasks to threads.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "isa.h"
#include "scratch.h"

namespace vidattn {

// The entry for an element type in the table of the current instruction set.
template <class Table>
const auto& kernels_for(torch::headeronly::ScalarType type, const Table& baseline, const Table& avx2,
                        const Table& avx512, const Table& avx512bf16) {
  using torch::headeronly::ScalarType;
  const Isa isa = current_isa();
  if (type == ScalarType::BFloat16 && isa == Isa::avx512_bf16) return avx512bf16.bfloat16;
  const Table& table = isa >= Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : baseline;
  switch (type) {
    case ScalarType::Float:
      return table.float32;
    case ScalarType::Double:
      return table.float64;
    case ScalarType::BFloat16:
      return table.bfloat16;
    case ScalarType::Half:
      return table.float16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
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
