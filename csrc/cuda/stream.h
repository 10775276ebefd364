// torch's current CUDA stream, asked of the torch that is there at run time: the extension loads beside one without
// CUDA.
#pragma once
#include <dlfcn.h>
#include <stdint.h>

namespace vidattn::cuda {

// Gives the stream of a device; false if torch does not tell.
inline bool current_stream(int32_t device, void** stream) {
  using Lookup = int (*)(int32_t, void**);
  static const auto lookup = [] {
    // Python loads torch's libraries for themselves, so that their symbols are no defaults. This loads nothing.
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Lookup>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  return lookup && lookup(device, stream) == 0;
}

}  // namespace vidattn::cuda
