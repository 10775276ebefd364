// What the compiler calls around every load and store, and where it would print that a program is undefined.
//
// Kernels are compiled with -fsanitize=thread and -fsanitize=bounds,alignment,..., but not linked with the libraries of
// the sanitizers: the functions of these names are ours.
#include "machine.h"

namespace emulator {
namespace {

inline __attribute__((always_inline)) void hook(void* p, size_t bytes, Access access, bool aligned, void* instruction) {
  const uintptr_t a = reinterpret_cast<uintptr_t>(p);
  if (!current || !options.checked) return;
  if (a - uintptr_t(stacks) < kStackBytes * kMaxThreads) return;  // a thread's own variables
  if (a - uintptr_t(&builtins) < sizeof builtins) return;
  check(a, bytes, access, *current, Place(instruction), aligned);
}

struct SourcePlace {  // what the compiler gives first
  const char* file;
  uint32_t line, column;
};

void undefined(const char* what, const SourcePlace* source) {
  if (!current) return;
  Place place;
  place.file = source->file, place.line = source->line;
  found("undefined behaviour", what, current, place, 0, true);
}

}  // namespace

extern "C" {

#define HOOKS(n)                                                   \
  void __tsan_read##n(void* p) {                                   \
    hook(p, n, Access::read, true, __builtin_return_address(0));   \
  }                                                                \
  void __tsan_write##n(void* p) {                                  \
    hook(p, n, Access::write, true, __builtin_return_address(0));  \
  }                                                                \
  void __tsan_volatile_read##n(void* p) {                          \
    hook(p, n, Access::read, true, __builtin_return_address(0));   \
  }                                                                \
  void __tsan_volatile_write##n(void* p) {                         \
    hook(p, n, Access::write, true, __builtin_return_address(0));  \
  }                                                                \
  void __tsan_unaligned_read##n(void* p) {                         \
    hook(p, n, Access::read, false, __builtin_return_address(0));  \
  }                                                                \
  void __tsan_unaligned_write##n(void* p) {                        \
    hook(p, n, Access::write, false, __builtin_return_address(0)); \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#undef HOOKS
void __tsan_read_range(void* p, size_t n) {
  hook(p, n, Access::read, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  hook(p, n, Access::write, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void __ubsan_handle_out_of_bounds(SourcePlace* s, uintptr_t) {
  undefined("array index out of range", s);
}
void __ubsan_handle_shift_out_of_bounds(SourcePlace* s, uintptr_t, uintptr_t) {
  undefined("shift out of range", s);
}
void __ubsan_handle_type_mismatch_v1(SourcePlace* s, uintptr_t p) {
  undefined(p ? "misaligned pointer" : "null pointer", s);
}
void __ubsan_handle_divrem_overflow(SourcePlace* s, uintptr_t, uintptr_t) {
  undefined("division by zero", s);
}
void __ubsan_handle_add_overflow(SourcePlace* s, uintptr_t, uintptr_t) {
  undefined("signed overflow of +", s);
}
void __ubsan_handle_sub_overflow(SourcePlace* s, uintptr_t, uintptr_t) {
  undefined("signed overflow of -", s);
}
void __ubsan_handle_mul_overflow(SourcePlace* s, uintptr_t, uintptr_t) {
  undefined("signed overflow of *", s);
}
void __ubsan_handle_negate_overflow(SourcePlace* s, uintptr_t) {
  undefined("signed overflow of -", s);
}

}  // extern "C"
}  // namespace emulator
