// What ops.cpp asks of the device. The tests put another file of this name first on the include path, which registers
// the ops for an emulated GPU.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// Where the native ops are registered: library and dispatch key.
#define VIDATTN_CUDA_LIBRARY vidattn, CUDA

namespace vidattn::cuda {

// Makes the device of a tensor the current one, as long as this lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& t) : device_(t.get_device_index()), guard_(device_) {}

  // torch's current stream. The symbol is looked up at run time, so that the extension loads beside a torch without
  // CUDA.
  void* stream() const {
    using Lookup = int (*)(int32_t, void**);
    static const auto lookup = reinterpret_cast<Lookup>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    void* stream = nullptr;
    STD_TORCH_CHECK(lookup && lookup(device_, &stream) == 0, "torch does not tell its current CUDA stream");
    return stream;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace vidattn::cuda
