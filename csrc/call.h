// What the calls of all families are made of: plain data, so that no torch header reaches files with their own flags.
#pragma once
#include <stdint.h>

namespace vidattn {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// The tensors of a call. Those that are read come first: the forward pass reads three, the backward pass four.
enum Slot { kQ, kK, kV, kDout, kOut, kDq, kDk, kDv };
constexpr int kSlots = 8;
constexpr bool is_of_keys(Slot slot) {
  return slot == kK || slot == kV || slot == kDk || slot == kDv;
}

// Element type of these tensors.
enum class Element { float32, float64, bfloat16, float16 };
constexpr int64_t bytes_of(Element element) {
  return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
}

struct RowTensor {  // (batch, row, heads, head_dim), contiguous head_dim; null data = absent
  char* data = nullptr;
  int64_t stride[3] = {0, 0, 0};  // bytes
};

// A family's kernels; [begin, end) are tasks that run on one thread.
template <class Args>
struct Kernels {
  int64_t (*scratch_bytes)(const Args&, bool backward);
  void (*forward)(const Args&, int64_t begin, int64_t end, char* scratch);
  void (*backward)(const Args&, int64_t begin, int64_t end, char* scratch);
};

// Those of an instruction set, by what they compute with. float32 takes tensors of 16 bits too. What is null, also one
// direction alone, is left to the next best instruction set.
template <class Kernels>
struct KernelTable {
  Kernels float32, float64, bfloat16;
};

}  // namespace vidattn
