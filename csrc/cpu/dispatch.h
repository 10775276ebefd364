// What the native ops of all families do on a CPU: find the kernels of the machine, and spread tasks over threads.
#pragma once
#include "arguments.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace vidattn {

template <class Args>
void set_seed(Args& a, const Tensor* seed) {
  STD_TORCH_CHECK(a.dropout_p == 0 || seed, "dropout needs a seed");
  if (a.dropout_p > 0) a.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
}

// The kernels of the current instruction set for one direction, from VIDATTN_KERNELS of the family.
template <class Kernels, size_t N>
const Kernels& kernels_for(Element element, bool backward, const KernelTable<Kernels>* const (&tables)[N]) {
  const auto has = [&](const Kernels& kernels) { return backward ? kernels.backward : kernels.forward; };
  for (int isa = current_isa();; isa = isa_before(isa)) {
    const KernelTable<Kernels>& table = *tables[isa];
    if (element == Element::bfloat16 && has(table.bfloat16)) return table.bfloat16;
    const Kernels& kernels = element == Element::float64 ? table.float64 : table.float32;
    if (has(kernels)) return kernels;
  }
}

// Runs tasks [0, tasks) of one direction on all threads.
template <class Args, class Kernels>
void run(const Args& args, const Kernels& kernels, bool backward, int64_t tasks) {
  const auto task_range = backward ? kernels.backward : kernels.forward;
  const int64_t bytes = kernels.scratch_bytes(args, backward);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { task_range(args, begin, end, thread_scratch(bytes)); });
}

}  // namespace vidattn
