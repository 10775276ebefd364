// Short sequences of divided attention on CUDA: which kernel runs a call, and how.
#include "divided_short.cuh"

#include "divided_short.h"

namespace vidattn::cuda {
namespace {

constexpr int kWarps = 4;  // of a block; they share nothing

template <class T, int kDim, int kRows>
__global__ void __launch_bounds__(32 * kWarps) short_forward(const __grid_constant__ ShortArguments a) {
  run_tile(a, [&](int tile, int only) { return ShortTile<T, kDim, kRows>(a, tile, only).forward(); });
}

template <class T, int kDim, int kRows>
__global__ void __launch_bounds__(32 * kWarps) short_backward(const __grid_constant__ ShortArguments a) {
  run_tile(a, [&](int tile, int only) { return ShortTile<T, kDim, kRows>(a, tile, only).backward(); });
}

template <class T, int kDim>
auto kernel_for(int rows, bool backward) {
  if (backward) return rows == 16 ? short_backward<T, kDim, 16> : short_backward<T, kDim, 32>;
  return rows == 16 ? short_forward<T, kDim, 16> : short_forward<T, kDim, 32>;
}

template <class T>
auto kernel_for(int64_t head_dim, int rows, bool backward) {
  return head_dim <= 32 ? kernel_for<T, 32>(rows, backward) : kernel_for<T, 64>(rows, backward);
}

// Rows of a tile: those of which whole sequences fill the larger share.
int tile_rows(int64_t length) {
  const auto filled = [&](int64_t rows) { return rows / length * length; };
  return 2 * filled(16) >= filled(32) ? 16 : 32;
}

// The largest of 16, 4 and 2 that all rows of a pass start at a multiple of, and that head_dim fills.
int unit_of(const DividedArgs& call) {
  uint64_t bits = uint64_t(call.head_dim) * 2;
  for (const RowTensor& x : call.tensor) {
    bits |= reinterpret_cast<uintptr_t>(x.data);
    for (int64_t stride : x.stride) bits |= uint64_t(stride);
  }
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
}

const char* start(const DividedArgs& call, bool backward, void* stream) {
  const int rows = tile_rows(call.patches);
  ShortArguments a{};
  a.call = call, a.unit = unit_of(call), a.scale = float(call.scale);
  const int64_t sequences = call.batch * call.groups, per_tile = rows / call.patches;
  const int64_t tiles = ceil_div(sequences, per_tile) * call.num_heads;
  if (sequences > INT32_MAX - 32 || tiles > INT32_MAX - kWarps || call.frames * call.sites > INT32_MAX)
    return "more than 2^31 sequences, or tokens of a clip";
  a.sequences = int(sequences), a.per_tile = int(per_tile), a.tiles = int(tiles);
  a.length = Divisor(call.patches), a.groups = Divisor(call.groups), a.heads = Divisor(call.num_heads);
  const auto kernel = call.element == Element::float16 ? kernel_for<__half>(call.head_dim, rows, backward)
                                                       : kernel_for<__nv_bfloat16>(call.head_dim, rows, backward);
  return gpu::launch(kernel, dim3(uint32_t(ceil_div(tiles, kWarps))), dim3(32 * kWarps), 0, stream, a);
}

}  // namespace

const char* divided_short_forward(const DividedArgs& call, void* stream) {
  return start(call, false, stream);
}

const char* divided_short_backward(const DividedArgs& call, void* stream) {
  return start(call, true, stream);
}

}  // namespace vidattn::cuda
