// What the *_ops.cpp ask of the device. The tests put another file of this name first on the include path, which
// registers the ops for an emulated GPU.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "stream.h"

// Where the native ops are registered: library and dispatch key.
#define VIDATTN_CUDA_LIBRARY vidattn, CUDA

namespace vidattn::cuda {

// Makes the device of a tensor the current one, as long as this lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& t) : tensor_(t), device_(t.get_device_index()), guard_(device_) {}

  // Memory of torch's allocator for so many floats, which belongs to the current stream; null for none. It is there
  // until the next call, or as long as this lives: launches before that have it.
  float* new_floats(int64_t count) {
    if (count == 0) return nullptr;
    floats_ = torch::stable::new_empty(tensor_, {count}, torch::headeronly::ScalarType::Float);
    return static_cast<float*>(floats_.data_ptr());
  }

  // torch's current stream.
  void* stream() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(current_stream(device_, &stream), "torch does not tell its current CUDA stream");
    return stream;
  }

 private:
  torch::stable::Tensor tensor_, floats_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace vidattn::cuda
