#include <torch/csrc/stable/library.h>

namespace vidattn {

// That of vidattn/ops/_library.py, which says when it grows.
int64_t native_version() {
  return 2;
}

}  // namespace vidattn

STABLE_TORCH_LIBRARY_IMPL(vidattn, CompositeExplicitAutograd, m) {
  m.impl("_native_version", TORCH_BOX(&vidattn::native_version));
}
