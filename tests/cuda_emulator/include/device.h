// What csrc/cuda/ops.cpp asks of the device, for the emulated GPU. It stands first on the include path.
#pragma once
#include <torch/csrc/stable/tensor.h>

// Names of their own, by the library that is built: a call that is meant for these kernels can reach no others.
#define VIDATTN_CUDA_LIBRARY VIDATTN_EMULATED_OPS, CPU

namespace vidattn::cuda {

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
};

}  // namespace vidattn::cuda
