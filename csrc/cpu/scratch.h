// Working memory of a thread: kept between calls, so that a call does not pay for fresh pages.
#pragma once
#include <cstdint>

namespace vidattn {

// At least `bytes` bytes, 64-byte aligned, valid until this thread asks again.
char* thread_scratch(int64_t bytes);

}  // namespace vidattn
