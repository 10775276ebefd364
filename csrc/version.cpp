#include <torch/csrc/stable/library.h>

#include <string>

namespace vidattn {

// That of vidattn/ops/_library.py, which says when it grows.
int64_t native_version() {
  return 7;
}

// The version of CUDA that compiled the kernels, or why there are none; setup.py says which.
std::string cuda_build() {
  return VIDATTN_CUDA_BUILD;
}

}  // namespace vidattn

STABLE_TORCH_LIBRARY_IMPL(vidattn, CompositeExplicitAutograd, m) {
  m.impl("_native_version", TORCH_BOX(&vidattn::native_version));
  m.impl("_cuda_build", TORCH_BOX(&vidattn::cuda_build));
}
