// What csrc/cuda/*_ops.cpp ask of the device, for the emulated GPU. It stands first on the include path.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// Names of their own, by the library that is built: a call that is meant for these kernels can reach no others. They
// are added when the library is linked, so that those are compiled once for all.
extern "C" const char emulated_namespace[];
#define VIDATTN_CUDA_LIBRARY emulated, CPU
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m)                                                               \
  static void register_##name(torch::stable::detail::StableLibrary&);                                         \
  static const torch::stable::detail::StableTorchLibraryInit registered_##name(                               \
      torch::stable::detail::StableLibrary::Kind::IMPL, &register_##name, emulated_namespace, #key, __FILE__, \
      __LINE__);                                                                                              \
  void register_##name(torch::stable::detail::StableLibrary& m)

namespace emulator {
void add_workspace(void* begin, size_t bytes);
}

namespace vidattn::cuda {

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& t) : tensor_(t) {}
  float* new_floats(int64_t count) {
    if (count == 0) return nullptr;
    floats_ = torch::stable::new_empty(tensor_, {count}, torch::headeronly::ScalarType::Float);
    emulator::add_workspace(floats_.data_ptr(), size_t(count) * sizeof(float));
    return static_cast<float*>(floats_.data_ptr());
  }
  void* stream() const { return nullptr; }

 private:
  torch::stable::Tensor tensor_, floats_;
};

}  // namespace vidattn::cuda
