// Rows of the tensors of a call. Those of 16 bits are widened when they are read and rounded when they are written, so
// that one kernel serves float32, bfloat16 and float16.
#pragma once
#include "call.h"
#include "tile.h"

namespace vidattn {
namespace VIDATTN_ISA {

constexpr int kMaxDim = 128;

alignas(64) constexpr char kZeros[kMaxDim * sizeof(double)] = {};  // a row of any type

// Whether rows can be used where they lie: the kernel's values are of the tensor's type.
template <class P>
VIDATTN_INLINE bool in_place(Element element) {
  return sizeof(typename P::Value) != 4 || element == Element::float32;
}

// n values of a row: where they lie, or widened into `spare`, which is filled up to a whole vector.
template <class P, class Value = typename P::Value>
VIDATTN_INLINE const Value* read_row(Element element, const char* row, int64_t n, Value* spare) {
  if (in_place<P>(element)) return reinterpret_cast<const Value*>(row);
  if constexpr (sizeof(Value) == 4) {
    const auto widen = [&](auto from) {
      for (int64_t i = 0; i < n; i += kLanes<Value>) store(spare + i, load_wide<Value>(from + i, n - i));
    };
    element == Element::bfloat16 ? widen((const bf16*)row) : widen((const f16*)row);
  }
  return spare;
}

// n values times a factor, rounded.
template <class P, class T = typename P::Acc>
VIDATTN_INLINE void write_row(Element element, const T* from, T factor, char* to, int64_t n) {
  const auto write = [&](auto row) {
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) store_narrow<T>(row + i, load(from + i) * factor, kLanes<T>);
    if (i < n) store_narrow<T>(row + i, load_first(from + i, n - i) * factor, n - i);
  };
  if (in_place<P>(element)) return write((typename P::Value*)to);
  if constexpr (sizeof(typename P::Value) == 4) element == Element::bfloat16 ? write((bf16*)to) : write((f16*)to);
}

// Whether a result of so many rows is written past the caches: a store that goes through them reads its line first.
// Only where rows are whole lines, and more than a core's caches would keep for whoever reads them next. Memory beyond
// what glibc keeps for reuse comes fresh from the kernel, which has cleared it: its lines are in the caches already.
VIDATTN_INLINE bool streams(const RowTensor& t, int64_t rows, int64_t head_bytes) {
  constexpr int64_t kLine = 64, kKept = 4 << 20, kReused = 32 << 20;
  int64_t places = reinterpret_cast<int64_t>(t.data) | head_bytes;
  for (int64_t stride : t.stride) places |= stride;
  const int64_t bytes = rows * t.stride[1];
  return t.data && places % kLine == 0 && bytes >= kKept && bytes <= kReused;
}
VIDATTN_INLINE void stream_row(const char* from, char* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kVectorBytes) stream((float*)(to + i), load((const float*)(from + i)));
}

// Brings a row into L2, or prepares it to be written.
template <bool Write = false>
VIDATTN_INLINE void fetch_row(const char* row, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, Write, 2);
}

}  // namespace VIDATTN_ISA
}  // namespace vidattn
