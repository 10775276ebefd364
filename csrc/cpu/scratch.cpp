#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace vidattn {

char* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> buffer;
  thread_local int64_t size = 0;
  if (size < bytes) {
    buffer.reset();
    size = (bytes + 4095) / 4096 * 4096;
    buffer.reset(static_cast<char*>(std::aligned_alloc(64, size)));
    if (!buffer) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.get();
}

}  // namespace vidattn
