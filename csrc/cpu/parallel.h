// The one way in which native ops spread work over threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <exception>

#ifdef VIDATTN_SANITIZED
#include "sanitized.h"
#endif

namespace vidattn {

// Calls work(first, last) for parts of [begin, end), of `grain` or more where there are as many, on torch's threads.
// What a part throws is thrown here: of torch's own error one could not tell that memory was missing.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& work) {
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto guarded = [&](int64_t first, int64_t last) {
    try {
      work(first, last);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
#ifdef VIDATTN_SANITIZED
  on_own_threads(begin, end, grain, guarded);
#else
  torch::stable::parallel_for(begin, end, grain, guarded);
#endif
  if (error) std::rethrow_exception(error);
}

}  // namespace vidattn
